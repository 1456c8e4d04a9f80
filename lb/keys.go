package lb

import (
	"fmt"
	"strings"
)

// keyPrefix starts every key; it is kvstore.Prefix, which this package may not import.
const keyPrefix = "causeway/v1/"

// ServicesPrefix starts the keys of a cluster's services.
func ServicesPrefix(cluster string) string { return keyPrefix + "services/" + cluster + "/" }

// ServiceKey is where a cluster's declaration of a service is stored.
func ServiceKey(cluster string, name Name) string {
	return ServicesPrefix(cluster) + name.Namespace + "/" + name.Name
}

// SlicesPrefix starts the keys of all slices of a cluster.
func SlicesPrefix(cluster string) string { return keyPrefix + "slices/" + cluster + "/" }

// ServiceSlicesPrefix starts the keys of a service's slices in a cluster.
func ServiceSlicesPrefix(cluster string, service Name) string {
	return SlicesPrefix(cluster) + service.Namespace + "/" + service.Name + "/"
}

// SliceKey is where a slice of a service's backends is stored.
func SliceKey(cluster string, service Name, slice string) string {
	return ServiceSlicesPrefix(cluster, service) + slice
}

// splitKey returns the n parts after "causeway/v1/KIND/".
func splitKey(key, kind string, n int) ([]string, error) {
	rest, found := strings.CutPrefix(key, keyPrefix+kind+"/")
	parts := strings.Split(rest, "/")
	if !found || len(parts) != n {
		return nil, fmt.Errorf("key %s is not that of an entry under %s%s/", quote(key), keyPrefix, kind)
	}
	return parts, nil
}
