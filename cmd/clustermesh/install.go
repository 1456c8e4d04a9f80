package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"causeway/identity"
	"causeway/k8s"
	"causeway/k8s/install"

	"github.com/spf13/cobra"
)

// kubeFlags name a Kubernetes cluster.
type kubeFlags struct {
	kubeconfig, context, namespace string
}

func (k *kubeFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&k.kubeconfig, "kubeconfig", "", "a kubeconfig `FILE` (default: those of $KUBECONFIG, else ~/.kube/config)")
	cmd.Flags().StringVar(&k.context, "context", "", "the kubeconfig's context `NAME` of the cluster (default: the current one)")
	cmd.Flags().StringVar(&k.namespace, "namespace", install.DefaultNamespace, "the `NAMESPACE` that Causeway is in")
}

func (k *kubeFlags) open() (*install.Cluster, error) {
	rest, err := k8s.RESTConfig(k.kubeconfig, k.context, false)
	if err != nil {
		return nil, usageError("%v", err)
	}
	return install.Open(rest)
}

// installFlags are an installation's options on the command line.
type installFlags struct {
	kube                    kubeFlags
	o                       install.Options
	id                      uint8
	encryption              string
	podCIDRs, serviceCIDRs  []string
	force, dry, wait, check bool
	timeout                 time.Duration
	f                       format
}

func newInstallCommand(e *env) *cobra.Command {
	i := &installFlags{}
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Put Causeway into a Kubernetes cluster",
		Long: `Put Causeway into a Kubernetes cluster, by server-side apply: an agent on every node, the cluster's own etcd with a volume for each member, and the least
rights that work. It tells what becomes of each object, and waits until all pods are ready. Doing it again changes what is different, which is nothing mostly.

What it needs to know of the cluster it asks the cluster for, where that says it, and before anything is changed it looks whether it can work: the API server's
version, our rights, another CNI plugin, a StorageClass, fields of our objects that somebody else has set.

The first install makes the cluster's certificate authority, in the Secret ` + install.AuthorityName + `, unless there is one of that name, with ca.crt and ca.key.

Exit codes:
  0    installed, and ready unless --wait=false
  1    refused, failed, or not ready in time
  2    wrong usage
  130  interrupted`,
		Example: `  clustermesh install --context east
  clustermesh install --context east --cluster-name east --cluster-id 1 --image registry.example.com/causeway/clustermesh:v1
  clustermesh install --context east --etcd-members 1
  clustermesh install --context east --dry-run                        what would become of each object
  clustermesh install --context east --dry-run -o yaml >causeway.yaml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return e.install(cmd, i, false) },
	}
	i.add(cmd)
	return cmd
}

func newUpgradeCommand(e *env) *cobra.Command {
	i := &installFlags{}
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Bring an installation in a Kubernetes cluster to this version",
		Long: `Bring an installation in a Kubernetes cluster to this version, with the options that it was installed with, except for those that are given. Certificates and
data stay. Agents are replaced one after the other; what they have put into their nodes' kernels goes on forwarding meanwhile.`,
		Example: `  clustermesh upgrade --context east
  clustermesh upgrade --context east --image registry.example.com/causeway/clustermesh:v2`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return e.install(cmd, i, true) },
	}
	i.add(cmd)
	return cmd
}

func (i *installFlags) add(cmd *cobra.Command) {
	i.kube.add(cmd)
	i.f = formatTable
	outputFlag(cmd, &i.f)
	flags := cmd.Flags()
	flags.StringVar(&i.o.ClusterName, "cluster-name", "", "the cluster's `NAME` in the mesh (default: that of --context)")
	flags.Uint8Var(&i.id, "cluster-id", 0, "the cluster's `ID` in the mesh, 1 to 255 (default: one that is free)")
	flags.StringVar(&i.o.Image, "image", "", "the `IMAGE` of agents and store (default: "+defaultImage()+")")
	flags.StringVar(&i.o.Mode, "mode", install.ModeCNI, "cni: pods have their network from Causeway; chained, from another CNI plugin, is not available yet")
	flags.StringSliceVar(&i.podCIDRs, "pod-cidr", nil, "the cluster's pod `RANGES`, if the cluster does not say them")
	flags.StringSliceVar(&i.serviceCIDRs, "service-cidr", nil, "the cluster's service `RANGES`, if the cluster does not say them")
	flags.StringVar(&i.o.APIServer, "api-server", "", "`host:port` at which nodes reach the API server (default: the kubeconfig's, with --mode cni)")
	flags.StringVar(&i.encryption, "encryption", string(identity.EncryptAll), "what WireGuard encrypts between nodes: all, inter-cluster or off")
	flags.IntVar(&i.o.Members, "etcd-members", install.DefaultMembers, "members of the cluster's etcd, each on another node: 1, 3 or 5")
	flags.StringVar(&i.o.StorageClass, "etcd-storage-class", "", "the StorageClass `NAME` of its volumes (default: the cluster's default)")
	flags.StringVar(&i.o.StorageSize, "etcd-storage-size", install.DefaultStorage, "the `SIZE` of each volume")
	flags.BoolVar(&i.force, "force-conflicts", false, "take over fields of our objects that somebody else has set")
	flags.BoolVar(&i.dry, "dry-run", false, "have the API server check all, and change nothing; with -o yaml print the objects")
	flags.BoolVar(&i.check, "check", true, "look before whether it can work in the cluster")
	flags.BoolVar(&i.wait, "wait", true, "wait until all pods are ready")
	flags.DurationVar(&i.timeout, "timeout", 10*time.Minute, "give up waiting after this")
}

// defaultImage is the image of this build.
func defaultImage() string {
	return install.DefaultImage + ":" + strings.ReplaceAll(buildVersion(), "+", "-")
}

// install installs or upgrades.
func (e *env) install(cmd *cobra.Command, i *installFlags, upgrade bool) error {
	if i.o.Mode == install.ModeChained {
		return usageError("--mode %s is not available in this version: the CNI plugin cannot be called after another one yet", install.ModeChained)
	}
	c, err := i.kube.open()
	if err != nil {
		return err
	}
	o, err := i.options(cmd, c, upgrade)
	if err != nil {
		return err
	}
	if i.f != formatTable && i.dry {
		manifest, err := install.Manifest(*o)
		if err != nil {
			return err
		}
		if i.f == formatJSON {
			return usageError("--dry-run prints YAML: -o yaml")
		}
		_, err = e.out.Write(manifest)
		return err
	}
	if err := o.Check(); err != nil {
		return err
	}
	if i.check {
		if err := c.CheckCluster(cmd.Context(), *o); err != nil {
			return err
		}
	}
	report := e.reportSteps(i.f)
	if err := c.Install(cmd.Context(), *o, install.Settings{ForceConflicts: i.force, DryRun: i.dry, Report: report}); err != nil || i.dry || !i.wait {
		return err
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), i.timeout)
	defer cancel()
	return c.Wait(ctx, *o, report)
}

// options are those of the installation that there is, or new ones, with what the flags say and what the cluster does.
func (i *installFlags) options(cmd *cobra.Command, c *install.Cluster, upgrade bool) (*install.Options, error) {
	o, err := c.Installed(cmd.Context(), i.kube.namespace)
	switch {
	case errors.Is(err, install.ErrNotInstalled) && !upgrade:
		o = &install.Options{ClusterName: i.kube.context, Namespace: i.kube.namespace, Image: defaultImage(), StoreToken: install.NewStoreToken()}
	case err != nil:
		return nil, err
	case upgrade:
		o.Image = defaultImage()
	}
	given := cmd.Flags().Changed
	for _, f := range []struct {
		name string
		set  func()
	}{
		{"cluster-name", func() { o.ClusterName = i.o.ClusterName }},
		{"cluster-id", func() { o.ClusterID = identity.ClusterID(i.id) }},
		{"image", func() { o.Image = i.o.Image }},
		{"mode", func() { o.Mode = i.o.Mode }},
		{"api-server", func() { o.APIServer = i.o.APIServer }},
		{"encryption", func() { o.Encryption = identity.Encryption(i.encryption) }},
		{"etcd-members", func() { o.Members = i.o.Members }},
		{"etcd-storage-class", func() { o.StorageClass = i.o.StorageClass }},
		{"etcd-storage-size", func() { o.StorageSize = i.o.StorageSize }},
	} {
		if given(f.name) {
			f.set()
		}
	}
	for _, f := range []struct {
		name  string
		texts []string
		to    *[]netip.Prefix
	}{{"pod-cidr", i.podCIDRs, &o.PodCIDRs}, {"service-cidr", i.serviceCIDRs, &o.ServiceCIDRs}} {
		if !given(f.name) {
			continue
		}
		*f.to = nil
		for _, text := range f.texts {
			p, err := netip.ParsePrefix(text)
			if err != nil {
				return nil, usageError("--%s %q: want a range like 10.244.0.0/16", f.name, text)
			}
			*f.to = append(*f.to, p)
		}
	}
	if o.ClusterName == "" {
		return nil, usageError("the cluster has no name yet: give --cluster-name, by which other clusters will know it")
	}
	o.SetDefaults()
	return o, c.Detect(cmd.Context(), o)
}

// reportSteps prints what becomes of each object.
func (e *env) reportSteps(f format) func(install.Step) {
	p := e.printer()
	return func(s install.Step) {
		if f != formatTable {
			_ = encode(e.out, f, s, true)
			return
		}
		colour := map[string]string{install.Unchanged: faint, install.Waiting: faint, install.Ready: green, install.Deleted: yellow}[s.Did]
		text := ""
		if s.Text != "" {
			text = "  " + printable(s.Text)
		}
		p.printf("%s  %s%s\n", p.paint(colour, pad(s.Did, len(install.Configured))), printable(s.Object), text)
	}
}

func newUninstallCommand(e *env) *cobra.Command {
	k := kubeFlags{}
	var yes, purge bool
	f := formatTable
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take Causeway out of a Kubernetes cluster",
		Long: `Take Causeway out of a Kubernetes cluster: its objects are deleted in the reverse of the order in which they were made, and what is left is told. The etcd's volumes, the
authority and the options stay, so that a later install is the same cluster for its peers, unless --purge is given. Disconnect from them first if it is for good.

What agents have put into their nodes stays there, and goes on forwarding, until a node is restarted; "clustermesh prepare-node --undo" on a node
removes the CNI plugin and its configuration.`,
		Example: `  clustermesh uninstall --context east
  clustermesh uninstall --context east --yes --purge`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := k.open()
			if err != nil {
				return err
			}
			o, err := c.Installed(cmd.Context(), k.namespace)
			if err != nil {
				return err
			}
			if !yes {
				if err := e.confirm(fmt.Sprintf("Take Causeway out of the cluster %s? Its pods lose their network.", o.ClusterName)); err != nil {
					return err
				}
			}
			return c.Uninstall(cmd.Context(), k.namespace, purge, e.reportSteps(f))
		},
	}
	k.add(cmd)
	outputFlag(cmd, &f)
	cmd.Flags().BoolVar(&yes, "yes", false, "don't ask")
	cmd.Flags().BoolVar(&purge, "purge", false, "delete the etcd's volumes, the authority, the options and the namespace too")
	return cmd
}

// confirm asks a person, and refuses where there is none.
func (e *env) confirm(question string) error {
	if !e.terminalIn {
		return usageError("nobody is there to be asked: pass --yes")
	}
	fmt.Fprintf(e.err, "%s [y/N] ", printable(question))
	var answer string
	_, _ = fmt.Fscanln(e.in, &answer)
	if a := strings.ToLower(answer); a != "y" && a != "yes" {
		return &exitError{exitFailed, errors.New("not confirmed; nothing was changed")}
	}
	return nil
}
