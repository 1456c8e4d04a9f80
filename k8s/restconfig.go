package k8s

import (
	"fmt"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// RESTConfig says how to reach an API server: inCluster as the pod that this process is in, else by a kubeconfig file (the files of $KUBECONFIG, or
// ~/.kube/config, if empty) and one of its contexts (the current one if empty). Nothing is connected to.
func RESTConfig(kubeconfig, context string, inCluster bool) (*rest.Config, error) {
	if inCluster {
		cfg, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("kubernetes: this is no pod with a service account: %w", err)
		}
		return cfg, nil
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	cfg, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: context}).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("kubernetes: %w: name a file with --kubeconfig, and one of its contexts with --context", err)
	}
	return cfg, nil
}
