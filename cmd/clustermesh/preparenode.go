package main

import (
	"fmt"
	"os"

	"causeway/k8s/install"

	"github.com/spf13/cobra"
)

// newPrepareNodeCommand returns "clustermesh prepare-node", which the agents' pods begin with.
func newPrepareNodeCommand(e *env) *cobra.Command {
	f := install.NodeFiles{}
	var undo bool
	cmd := &cobra.Command{
		Use:   "prepare-node",
		Short: "Make a node of Kubernetes ready for its agent",
		Long: `Make a node of Kubernetes ready for its agent: the agent's certificate, the CNI plugin (this program itself), and a network configuration that names it. Agents' pods do this
each time before they start the agent. --undo removes the configuration and the plugin, after an uninstall.`,
		Example: `  clustermesh prepare-node --authority /authority
  clustermesh prepare-node --undo`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if undo {
				return install.UndoNode(f)
			}
			if f.Authority == "" {
				return usageError("no authority given: name its directory with --authority DIRECTORY")
			}
			if f.Mode != install.ModeCNI && f.Mode != install.ModeChained {
				return usageError("--mode %q is not one of %s and %s", f.Mode, install.ModeCNI, install.ModeChained)
			}
			var err error
			if f.Program, err = os.Executable(); err != nil {
				return fmt.Errorf("this program's own file: %w", err)
			}
			return install.PrepareNode(f, e.now())
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.Mode, "mode", install.ModeCNI, "cni: pods have their network from Causeway; chained: from another CNI plugin, whose configuration is extended")
	flags.StringVar(&f.Authority, "authority", "", "a `DIRECTORY` with the cluster's authority, ca.crt and ca.key")
	flags.StringVar(&f.PKI, "pki", "/var/lib/causeway/pki", "the `DIRECTORY` for the agent's certificate")
	flags.StringVar(&f.BinDir, "cni-bin-dir", "/opt/cni/bin", "the `DIRECTORY` of the container runtime's CNI plugins")
	flags.StringVar(&f.ConfDir, "cni-conf-dir", "/etc/cni/net.d", "the `DIRECTORY` of its network configurations")
	flags.BoolVar(&undo, "undo", false, "remove the plugin and the configuration")
	return cmd
}
