package main

import (
	"context"
	"errors"
	"time"

	"causeway/k8s"
	"causeway/k8s/remote"

	"github.com/spf13/cobra"
)

// kubeConnect names two clusters of Kubernetes that are to be joined.
type kubeConnect struct {
	kubeFlags
	to string
}

func (k *kubeConnect) add(cmd *cobra.Command) {
	k.kubeFlags.add(cmd)
	cmd.Flags().StringVar(&k.to, "to", "", "the kubeconfig's context `NAME` of the cluster to join, with --context; instead of a token")
}

func (k *kubeConnect) wanted() bool { return k.context != "" || k.to != "" }

// tokenMargin is how much longer a token holds than a connect may take.
const tokenMargin = time.Minute

// connectContexts has agents of both clusters do it.
func (e *env) connectContexts(cmd *cobra.Command, k kubeConnect, args []string, isolated bool, timeout time.Duration, f format) error {
	switch {
	case len(args) > 0:
		return usageError("a token and --context or --to: give one of them; with both contexts a token is made")
	case k.context == "" || k.to == "":
		return usageError("two clusters of Kubernetes are joined with both --context and --to, contexts of the kubeconfig")
	case k.context == k.to:
		return usageError("--context and --to are both %q: a cluster is not joined with itself", k.to)
	}
	find := func(name string) (remote.Agent, error) {
		rest, err := k8s.RESTConfig(k.kubeconfig, name, false)
		if err != nil {
			return nil, usageError("%v", err)
		}
		return remote.FindAgent(cmd.Context(), rest, k.namespace, name)
	}
	from, err := find(k.context)
	if err != nil {
		return err
	}
	to, err := find(k.to)
	if err != nil {
		return err
	}
	// The agent gives up in time by itself, and takes back what was begun: it is waited for a little longer.
	ctx, cancel := context.WithTimeout(cmd.Context(), timeout+tokenMargin)
	defer cancel()
	said := []string{"--timeout=" + timeout.String(), "--output=" + string(f)}
	if isolated {
		said = append(said, "--isolated")
	}
	err = remote.Connect(ctx, from, to, timeout+tokenMargin, said, e.out, e.err)
	var exit *remote.ExitError
	if errors.As(err, &exit) && exit == err {
		return &exitError{code: exit.Code} // it has said why
	}
	return err
}
