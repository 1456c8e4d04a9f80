package pki

import (
	"crypto/rand"
	"fmt"
	"regexp"
	"strings"
)

const (
	peerPrefix = "peer-"
	// randomLength is the number of base32 characters that end a peer's user: 40 bits, so that no name comes twice.
	randomLength = 8
)

var (
	clusterName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	randomEnd   = regexp.MustCompile(`^[a-z2-7]{8}$`)
)

// PeerUser returns the name of a new user for a peer: peer-CLUSTER-RANDOM. It is another one for each connection, so that a
// certificate of an earlier one never works again.
func PeerUser(cluster string) string {
	return peerPrefix + cluster + "-" + strings.ToLower(rand.Text()[:randomLength])
}

// ClusterOf returns the cluster that a peer's user is of.
func ClusterOf(user string) (cluster string, ok bool) {
	rest, ok := strings.CutPrefix(user, peerPrefix)
	end := strings.LastIndexByte(rest, '-')
	if !ok || end < 0 || !randomEnd.MatchString(rest[end+1:]) || !clusterName.MatchString(rest[:end]) {
		return "", false
	}
	return rest[:end], true
}

func checkCluster(cluster string) error {
	if !clusterName.MatchString(cluster) {
		return fmt.Errorf("pki: cluster name %.70q: want 1 to 63 lower case letters, digits and hyphens, with no hyphen at either end", cluster)
	}
	return nil
}
