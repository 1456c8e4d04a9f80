package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"causeway/k8s"
)

const (
	// nodeNameEnv is what a pod's manifest gives the name of its node in, by the downward API.
	nodeNameEnv = "NODE_NAME"
	// nodeInfoTimeout bounds the one question that comes before anything else.
	nodeInfoTimeout = 30 * time.Second
)

// fillFromNode completes what is this node's own by its Node of Kubernetes.
func (c *Config) fillFromNode() error {
	if !c.Kubernetes.Enabled() {
		return nil
	}
	setDefault(&c.Node.Name, os.Getenv(nodeNameEnv))
	if c.Node.Name == "" || c.Node.Address.IsValid() && len(c.Node.PodCIDRs) > 0 {
		return nil // check says that there is no name
	}
	rest, err := k8s.RESTConfig(c.Kubernetes.Kubeconfig, c.Kubernetes.Context, c.Kubernetes.InCluster)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), nodeInfoTimeout)
	defer cancel()
	info, err := k8s.NodeInfo(ctx, rest, c.Node.Name)
	if err != nil {
		return err
	}
	setDefault(&c.Node.Address, info.Address)
	if len(c.Node.PodCIDRs) == 0 {
		c.Node.PodCIDRs = info.PodCIDRs
	}
	return nil
}

// podName splits a name that cluster DNS has for a pod of a headless Service, POD.SERVICE.NAMESPACE.svc.
func podName(host string) (service, namespace string, ok bool) {
	parts := strings.Split(host, ".")
	if len(parts) != 4 || parts[3] != "svc" {
		return "", "", false
	}
	return parts[1], parts[2], true
}

// setupResolver has names of the store's pods resolved by the API server: cluster DNS, and the way to it, may not be there without this agent.
func (a *agent) setupResolver() error {
	if !a.cfg.Kubernetes.Enabled() {
		return nil
	}
	for _, endpoint := range a.cfg.KVStore.Endpoints {
		service, namespace, ok := podName(endpointHost(endpoint))
		if !ok {
			continue
		}
		k := a.cfg.Kubernetes
		rest, err := k8s.RESTConfig(k.Kubeconfig, k.Context, k.InCluster)
		if err != nil {
			return err
		}
		a.resolver, err = k8s.PodResolver(rest, service, namespace)
		return err
	}
	return nil
}

// storeDialer is how the own store is connected to; nil is the net package's way.
func (a *agent) storeDialer() func(ctx context.Context, address string) (net.Conn, error) {
	if a.resolver == nil {
		return nil
	}
	d := &net.Dialer{Resolver: a.resolver}
	return func(ctx context.Context, address string) (net.Conn, error) { return d.DialContext(ctx, "tcp", address) }
}

func endpointHost(endpoint string) string {
	if u, err := url.Parse(endpoint); err == nil && u.Host != "" {
		return u.Hostname()
	}
	host, _, err := net.SplitHostPort(endpoint)
	if err != nil {
		return endpoint
	}
	return host
}

// resolveEndpoints puts the addresses of the store's pods in place of their names, which other clusters don't know. A pod that is nowhere at the moment is left
// out, unless all are.
func (a *agent) resolveEndpoints(ctx context.Context, endpoints []string) (out []string, err error) {
	var lost error
	for _, endpoint := range endpoints {
		host := endpointHost(endpoint)
		if _, _, pod := podName(host); !pod || a.resolver == nil {
			out = append(out, endpoint)
			continue
		}
		addresses, err := a.resolver.LookupHost(ctx, host)
		if err != nil {
			lost = errors.Join(lost, err)
			continue
		}
		_, port, err := net.SplitHostPort(strings.TrimPrefix(endpoint, "https://"))
		if err != nil {
			return nil, fmt.Errorf("the store's endpoint %q: %w; want https://host:port", endpoint, err)
		}
		out = append(out, "https://"+net.JoinHostPort(addresses[0], port))
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("where other clusters reach this cluster's store is not known: %w", lost)
	}
	return out, nil
}
