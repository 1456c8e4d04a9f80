// Package kubelet is Kubernetes' own kubelet (k8s.io/kubernetes/pkg/kubelet, all of it: probes, volumes, environment, restarts, termination, status, logs, restoring after a
// restart) on a container runtime whose containers are plain processes of this machine, so that nodes of a test-bed need no container engine, no images and no privileged helpers.
//
// The runtime is [Runtime]: a CRI v1 server on a socket under the kubelet's root directory, in the same process. Pods are connected as the CNI specification says, by libcni.
// Images are names that a table maps to commands, see [Images]. What holds containers while no kubelet runs is package shim.
//
// What a cluster's administrator would miss, on purpose: resource limits, users, capabilities, seccomp, hostPID and hostIPC, mount propagation, block devices and volumes
// other than configMap, downwardAPI, emptyDir, hostPath, projected and secret; emptyDir of medium Memory lies on disk. Statistics are empty.
// The runtime waits up to [stopDelay] before SIGTERM.
package kubelet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	cadvisorapi "github.com/google/cadvisor/info/v1"
	"github.com/spf13/cobra"
	"go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/component-base/version"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/cmd/kubelet/app"
	"k8s.io/kubernetes/cmd/kubelet/app/options"
	kubeletpkg "k8s.io/kubernetes/pkg/kubelet"
	"k8s.io/kubernetes/pkg/kubelet/cadvisor"
	cadvisortest "k8s.io/kubernetes/pkg/kubelet/cadvisor/testing"
	"k8s.io/kubernetes/pkg/kubelet/cm"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/util/oom"
	"k8s.io/kubernetes/pkg/volume"
	"k8s.io/kubernetes/pkg/volume/configmap"
	"k8s.io/kubernetes/pkg/volume/downwardapi"
	"k8s.io/kubernetes/pkg/volume/emptydir"
	"k8s.io/kubernetes/pkg/volume/hostpath"
	"k8s.io/kubernetes/pkg/volume/projected"
	"k8s.io/kubernetes/pkg/volume/secret"
	"k8s.io/kubernetes/pkg/volume/util/hostutil"
	"k8s.io/kubernetes/pkg/volume/util/subpath"
	"k8s.io/mount-utils"
)

// Port is where a node's kubelet serves logs, exec, attach and port-forward to the API server, on the node's first address.
const Port = 10250

type config struct {
	kubeconfig, nodeName                string
	nodeIPs, podCIDRs                   []string
	clusterDNS, clusterDomain           string
	serverCert, serverKey, clientCAFile string
	runtime                             RuntimeConfig
}

// Command returns the program. It must be run in the node's network namespace and the machine's mount namespace. It may be killed at any time: containers stay, and the next run with the same
// root directory takes them over. It leaves the Node object registered.
func Command() *cobra.Command {
	var c config
	cmd := &cobra.Command{
		Use:          "kubelet",
		Short:        "Run a node whose containers are plain processes",
		Args:         cobra.NoArgs,
		SilenceUsage: true,
		RunE:         func(cmd *cobra.Command, _ []string) error { return c.run(cmd.Context()) },
	}
	f := cmd.Flags()
	f.StringVar(&c.kubeconfig, "kubeconfig", "", "file with the API server's address and this node's credentials (user system:node:NAME, group system:nodes)")
	f.StringVar(&c.nodeName, "node-name", "", "name of the Node")
	f.StringSliceVar(&c.nodeIPs, "node-ip", nil, "the node's address, or one of each family; the kubelet serves on the first")
	f.StringSliceVar(&c.podCIDRs, "pod-cidr", nil, "the prefix of the node's pods, or one of each family, written into the Node; without it the controller-manager gives one")
	f.StringVar(&c.runtime.Root, "root-dir", "", "directory for everything that is kept: state, volumes, logs")
	f.StringVar(&c.runtime.Cgroup, "cgroup", "", "directory of a cgroup v2 in which each pod gets one")
	f.StringVar(&c.runtime.CNIConf, "cni-conf-dir", "", "directory of CNI configurations; the first by name counts, and the node is not ready without one")
	f.StringSliceVar(&c.runtime.CNIBin, "cni-bin-dir", nil, "directories of CNI plugins")
	f.StringVar(&c.runtime.NetNSPrefix, "netns-prefix", "", "names of pods' network namespaces begin with this and -pod-")
	f.StringVar(&c.clusterDNS, "cluster-dns", "", "address of the cluster's name server")
	f.StringVar(&c.clusterDomain, "cluster-domain", "cluster.local", "the cluster's domain")
	f.StringVar(&c.runtime.Images, "images", "", "table of images: a YAML list of image (a glob), command, args, env")
	f.StringVar(&c.serverCert, "server-cert", "", "certificate with which the kubelet serves")
	f.StringVar(&c.serverKey, "server-key", "", "its key")
	f.StringVar(&c.clientCAFile, "client-ca", "", "CA of the client certificates that are let in, if their user may access nodes/proxy")
	for _, name := range []string{
		"kubeconfig", "node-name", "node-ip", "root-dir", "cgroup", "cni-conf-dir", "cni-bin-dir", "netns-prefix", "cluster-dns", "images", "server-cert", "server-key", "client-ca",
	} {
		cmd.MarkFlagRequired(name)
	}
	return cmd
}

func (c config) check() error {
	for _, ip := range append([]string{c.clusterDNS}, c.nodeIPs...) {
		if _, err := netip.ParseAddr(ip); err != nil {
			return fmt.Errorf("--node-ip and --cluster-dns are addresses: %w", err)
		}
	}
	for _, prefix := range c.podCIDRs {
		if p, err := netip.ParsePrefix(prefix); err != nil || p != p.Masked() {
			return fmt.Errorf("--pod-cidr %s is no prefix, or has bits set beyond its length", prefix)
		}
	}
	if !filepath.IsAbs(c.runtime.Root) {
		return fmt.Errorf("--root-dir %s: give an absolute path, containers have another working directory", c.runtime.Root)
	}
	return nil
}

func (c config) run(ctx context.Context) error {
	if err := c.check(); err != nil {
		return err
	}
	rt, err := NewRuntime(ctx, c.runtime)
	if err != nil {
		return err
	}
	endpoint, err := rt.Serve(ctx)
	if err != nil {
		return err
	}
	if err := c.register(ctx); err != nil {
		return err
	}
	server, err := c.server(endpoint)
	if err != nil {
		return err
	}
	deps, err := c.dependencies(ctx, server)
	if err != nil {
		return err
	}
	return app.Run(ctx, server, deps, utilfeature.DefaultFeatureGate)
}

// register makes the Node, if there is none, with the pods' prefixes, which a kubelet itself leaves to the controller-manager.
func (c config) register(ctx context.Context) error {
	if len(c.podCIDRs) == 0 {
		return nil
	}
	rest, err := clientcmd.BuildConfigFromFlags("", c.kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(rest)
	if err != nil {
		return err
	}
	nodes := client.CoreV1().Nodes()
	return wait.PollUntilContextCancel(ctx, 200*time.Millisecond, true, func(ctx context.Context) (bool, error) {
		node, err := nodes.Get(ctx, c.nodeName, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			_, err = nodes.Create(ctx, &corev1.Node{
				ObjectMeta: metav1.ObjectMeta{Name: c.nodeName, Labels: map[string]string{
					corev1.LabelHostname: c.nodeName, corev1.LabelOSStable: runtime.GOOS, corev1.LabelArchStable: runtime.GOARCH,
				}},
				Spec: corev1.NodeSpec{PodCIDR: c.podCIDRs[0], PodCIDRs: c.podCIDRs},
			}, metav1.CreateOptions{})
		case err == nil && len(node.Spec.PodCIDRs) == 0:
			patch := fmt.Sprintf(`{"spec":{"podCIDR":%q,"podCIDRs":["%s"]}}`, c.podCIDRs[0], strings.Join(c.podCIDRs, `","`))
			_, err = nodes.Patch(ctx, c.nodeName, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
		case err == nil && !slices.Equal(node.Spec.PodCIDRs, c.podCIDRs):
			return false, fmt.Errorf("node %s has the pod CIDRs %s, which cannot be changed to %s: delete the Node, or run the controller-manager without --allocate-node-cidrs",
				c.nodeName, strings.Join(node.Spec.PodCIDRs, ","), strings.Join(c.podCIDRs, ","))
		}
		if err != nil {
			klog.ErrorS(err, "Registering the node, will try again", "node", c.nodeName)
		}
		return err == nil, nil
	})
}

// server returns the kubelet's own flags and configuration.
func (c config) server(endpoint string) (*options.KubeletServer, error) {
	s, err := options.NewKubeletServer()
	if err != nil {
		return nil, err
	}
	s.KubeConfig = c.kubeconfig
	s.HostnameOverride = c.nodeName
	s.NodeIP = strings.Join(c.nodeIPs, ",")
	s.RootDirectory = c.runtime.Root
	s.CertDirectory = filepath.Join(c.runtime.Root, "pki")
	s.PodLogsDir = filepath.Join(c.runtime.Root, "logs")
	s.ContainerRuntimeEndpoint = endpoint
	s.Address, s.Port, s.ReadOnlyPort, s.HealthzPort = c.nodeIPs[0], Port, 0, 0
	s.TLSCertFile, s.TLSPrivateKeyFile = c.serverCert, c.serverKey
	s.Authentication.X509.ClientCAFile = c.clientCAFile
	s.Authentication.Anonymous.Enabled = false
	s.ClusterDNS, s.ClusterDomain = []string{c.clusterDNS}, c.clusterDomain
	s.SerializeImagePulls = false
	// What the machine is spared: no cgroups but the runtime's, no iptables, no eviction, no watching of disks.
	s.CgroupsPerQOS, s.EnforceNodeAllocatable = false, nil
	s.MakeIPTablesUtilChains = false
	s.FailSwapOn = false
	s.EvictionHard = map[string]string{}
	s.LocalStorageCapacityIsolation = false
	s.ImageGCHighThresholdPercent, s.ImageGCLowThresholdPercent = 100, 99
	s.EnableSystemLogHandler = false
	s.VolumePluginDir = filepath.Join(c.runtime.Root, "volumeplugins")
	return s, nil
}

func (c config) dependencies(ctx context.Context, s *options.KubeletServer) (*kubeletpkg.Dependencies, error) {
	tls, err := app.InitializeTLS(ctx, &s.KubeletFlags, &s.KubeletConfiguration)
	if err != nil {
		return nil, err
	}
	var plugins []volume.VolumePlugin
	for _, probe := range []func() []volume.VolumePlugin{
		configmap.ProbeVolumePlugins, downwardapi.ProbeVolumePlugins, emptydir.ProbeVolumePlugins, projected.ProbeVolumePlugins, secret.ProbeVolumePlugins,
		func() []volume.VolumePlugin { return hostpath.ProbeVolumePlugins(volume.VolumeConfig{}) },
	} {
		plugins = append(plugins, probe()...)
	}
	return &kubeletpkg.Dependencies{
		CAdvisorInterface: machine{&cadvisortest.Fake{NodeName: c.nodeName}},
		ContainerManager:  cm.NewStubContainerManager(),
		HostUtil:          hostutil.NewHostUtil(),
		// Nothing is mounted on the machine, so that nothing is left when everything is killed: volumes are directories, which the runtime mounts in the container.
		Mounter:        mount.NewFakeMounter(nil),
		Subpather:      &subpather{},
		OOMAdjuster:    oom.NewFakeOOMAdjuster(),
		OSInterface:    osInterface{},
		VolumePlugins:  plugins,
		TLSOptions:     tls,
		TracerProvider: noop.NewTracerProvider(),
	}, nil
}

// machine tells the kubelet what the machine has.
type machine struct{ *cadvisortest.Fake }

var _ cadvisor.Interface = machine{}

func (m machine) MachineInfo() (*cadvisorapi.MachineInfo, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return nil, err
	}
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return &cadvisorapi.MachineInfo{
		NumCores: runtime.NumCPU(), MemoryCapacity: uint64(info.Totalram) * uint64(info.Unit), InstanceID: cadvisorapi.InstanceID(m.NodeName), BootID: strings.TrimSpace(string(id)),
	}, err
}

func (machine) VersionInfo() (*cadvisorapi.VersionInfo, error) {
	var name unix.Utsname
	err := unix.Uname(&name)
	return &cadvisorapi.VersionInfo{KernelVersion: unix.ByteSliceToString(name.Release[:]), ContainerOsVersion: "Causeway test-bed " + version.Get().GitVersion}, err
}

// subpather gives containers a part of a volume by its path.
type subpather struct{ subpath.FakeSubpath }

func (subpather) SafeMakeDir(subdir, base string, perm os.FileMode) error {
	return os.MkdirAll(filepath.Join(base, subdir), perm)
}

// osInterface keeps the kubelet from writing links to logs into the machine's /var/log/containers, for old log collectors.
type osInterface struct{ kubecontainer.RealOS }

func (o osInterface) MkdirAll(path string, perm os.FileMode) error {
	if path == kubeletpkg.ContainerLogsDir {
		return nil
	}
	return o.RealOS.MkdirAll(path, perm)
}

func (o osInterface) Symlink(to, path string) error {
	if filepath.Dir(path) == kubeletpkg.ContainerLogsDir {
		return nil
	}
	return o.RealOS.Symlink(to, path)
}

var errNotFound = errors.New("not found")
