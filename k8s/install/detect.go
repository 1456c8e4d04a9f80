package install

import (
	"context"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// Detect fills in what options lack and the cluster says: its ranges, and where its API server is. What it does not say stays empty, and Check tells what to pass.
func (c *Cluster) Detect(ctx context.Context, o *Options) error {
	if len(o.ServiceCIDRs) == 0 {
		found, err := c.client.NetworkingV1().ServiceCIDRs().Get(ctx, "kubernetes", metav1.GetOptions{})
		switch {
		case err == nil:
			if o.ServiceCIDRs, err = prefixes(found.Spec.CIDRs); err != nil {
				return fmt.Errorf("ServiceCIDR kubernetes: %w", err)
			}
		case !apierrors.IsNotFound(err): // an API server before 1.33 has none
			return fmt.Errorf("the API server %s: ServiceCIDR kubernetes: %w", c.host, err)
		}
	}
	if len(o.PodCIDRs) == 0 || len(o.ServiceCIDRs) == 0 {
		if err := c.askKubeadm(ctx, o); err != nil {
			return err
		}
	}
	if o.APIServer == "" && o.Mode == ModeCNI {
		server, err := apiServer(c.host)
		if err != nil {
			return err
		}
		o.APIServer = server
	}
	return nil
}

// askKubeadm reads what kubeadm has made the cluster with, if it has.
func (c *Cluster) askKubeadm(ctx context.Context, o *Options) error {
	kept, err := c.client.CoreV1().ConfigMaps("kube-system").Get(ctx, "kubeadm-config", metav1.GetOptions{})
	if apierrors.IsNotFound(err) || apierrors.IsForbidden(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("the API server %s: ConfigMap kube-system/kubeadm-config: %w", c.host, err)
	}
	var config struct {
		Networking struct {
			PodSubnet     string `json:"podSubnet"`
			ServiceSubnet string `json:"serviceSubnet"`
		} `json:"networking"`
	}
	if err := yaml.Unmarshal([]byte(kept.Data["ClusterConfiguration"]), &config); err != nil {
		return fmt.Errorf("ConfigMap kube-system/kubeadm-config: ClusterConfiguration: %w: pass --pod-cidr and --service-cidr", err)
	}
	for _, f := range []struct {
		to   *[]netip.Prefix
		text string
	}{{&o.PodCIDRs, config.Networking.PodSubnet}, {&o.ServiceCIDRs, config.Networking.ServiceSubnet}} {
		if len(*f.to) > 0 || f.text == "" {
			continue
		}
		if *f.to, err = prefixes(strings.Split(f.text, ",")); err != nil {
			return fmt.Errorf("ConfigMap kube-system/kubeadm-config: %w: pass --pod-cidr and --service-cidr", err)
		}
	}
	return nil
}

func prefixes(texts []string) (out []netip.Prefix, err error) {
	for _, text := range texts {
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// apiServer turns the URL of a kubeconfig into what nodes can reach.
func apiServer(host string) (string, error) {
	u, err := url.Parse(host)
	if err != nil || u.Hostname() == "" {
		return "", fmt.Errorf("the API server's URL %q has no host: pass --api-server host:port, as nodes reach it", host)
	}
	name, port := u.Hostname(), u.Port()
	if port == "" {
		port = map[string]string{"https": "443", "http": "80"}[u.Scheme]
	}
	if ip, err := netip.ParseAddr(name); name == "localhost" || err == nil && ip.IsLoopback() {
		return "", fmt.Errorf("the kubeconfig's API server is at %s, which is this machine's own loopback: pass --api-server host:port, as nodes reach it", host)
	}
	if slices.Contains([]string{"", "0.0.0.0"}, name) {
		return "", fmt.Errorf("the kubeconfig's API server %s is no address to connect to: pass --api-server host:port", host)
	}
	if strings.Contains(name, ":") {
		name = "[" + name + "]"
	}
	return name + ":" + port, nil
}
