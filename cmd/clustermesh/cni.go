package main

import (
	"causeway/datapath"
	"causeway/k8s/cni"

	"github.com/spf13/cobra"
)

// newCNICommand is what a container runtime calls by another name, and not for people.
func newCNICommand() *cobra.Command {
	return &cobra.Command{
		Use:   "cni",
		Short: "Connect pods, called by a container runtime as the CNI specification says",
		Long: `Connect pods, called by a container runtime as the CNI specification says: the call is in the environment (CNI_COMMAND and so on) and the
network configuration on the standard input; the result is on the standard output.

Called by the name ` + cni.Name + `, which a link in the runtime's directory of plugins gives it, the program does the same without any arguments.`,
		Example: `  clustermesh cni                            what it is, and which versions of the specification it knows
  ln -s /usr/local/bin/clustermesh /opt/cni/bin/` + cni.Name,
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if code := cniPlugin().Run(); code != 0 {
				return &exitError{code: code} // it has said why
			}
			return nil
		},
	}
}

func cniPlugin() *cni.Plugin {
	return &cni.Plugin{
		Version: buildVersion(), Patience: cni.DefaultPatience, Remove: datapath.DeletePodEnd,
		Look: func(netns, name string) (cni.Interface, error) {
			end, err := datapath.LookAtPodEnd(netns, name)
			return cni.Interface(end), err
		},
	}
}
