package kubelet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	netnsDir = "/run/netns"
	// ifName is the pod's interface, that of all runtimes.
	ifName = "eth0"
)

// network connects network namespaces by CNI.
type network struct {
	cni     *libcni.CNIConfig
	confDir string
}

// config returns the first configuration, as other runtimes do.
func (n *network) config() (*libcni.NetworkConfigList, error) {
	files, err := libcni.ConfFiles(n.confDir, []string{".conflist"})
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no CNI configuration (*.conflist) in %s: the network's plugin is not installed yet", n.confDir)
	}
	slices.Sort(files)
	list, err := libcni.NetworkConfFromFile(files[0])
	if err != nil {
		return nil, fmt.Errorf("reading the CNI configuration %s: %w", files[0], err)
	}
	return list, nil
}

func attachment(s *sandbox) *libcni.RuntimeConf {
	m := s.config.GetMetadata()
	rt := &libcni.RuntimeConf{
		ContainerID: s.ID, NetNS: s.NetNS, IfName: ifName,
		Args: [][2]string{
			{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", m.GetNamespace()}, {"K8S_POD_NAME", m.GetName()}, {"K8S_POD_INFRA_CONTAINER_ID", s.ID}, {"K8S_POD_UID", m.GetUid()},
		},
		CapabilityArgs: map[string]any{},
	}
	var ports []map[string]any
	for _, p := range s.config.GetPortMappings() {
		if p.HostPort != 0 {
			ports = append(ports, map[string]any{
				"hostPort": p.HostPort, "containerPort": p.ContainerPort, "hostIP": p.HostIp,
				"protocol": map[runtimeapi.Protocol]string{runtimeapi.Protocol_TCP: "tcp", runtimeapi.Protocol_UDP: "udp", runtimeapi.Protocol_SCTP: "sctp"}[p.Protocol],
			})
		}
	}
	if ports != nil {
		rt.CapabilityArgs["portMappings"] = ports
	}
	return rt
}

// add connects a sandbox and returns its addresses, as the plugins gave them.
func (n *network) add(ctx context.Context, s *sandbox) ([]string, error) {
	list, err := n.config()
	if err != nil {
		return nil, err
	}
	res, err := n.cni.AddNetworkList(ctx, list, attachment(s))
	if err != nil {
		return nil, fmt.Errorf("CNI ADD of %s: %w", s.name(), err)
	}
	result, err := types100.NewResultFromResult(res)
	if err != nil {
		return nil, fmt.Errorf("CNI ADD of %s: %w", s.name(), err)
	}
	addresses := podAddresses(result)
	if len(addresses) == 0 {
		return nil, fmt.Errorf("CNI ADD of %s: the network %s gave %s no address", s.name(), list.Name, ifName)
	}
	return addresses, nil
}

// podAddresses returns those of the pod's interface; a result may also tell of others, as the host's end.
func podAddresses(r *types100.Result) []string {
	var all []string
	for _, ip := range r.IPs {
		if i := ip.Interface; i != nil && *i >= 0 && *i < len(r.Interfaces) && r.Interfaces[*i].Sandbox == "" {
			continue
		}
		all = append(all, ip.Address.IP.String())
	}
	return all
}

// del disconnects a sandbox. It may be repeated.
func (n *network) del(ctx context.Context, s *sandbox) error {
	list, err := n.config()
	if err != nil {
		return err
	}
	if err := n.cni.DelNetworkList(ctx, list, attachment(s)); err != nil {
		return fmt.Errorf("CNI DEL of %s: %w", s.name(), err)
	}
	return nil
}

func (n *network) check(ctx context.Context, s *sandbox) error {
	list, err := n.config()
	if err != nil {
		return err
	}
	if err := n.cni.CheckNetworkList(ctx, list, attachment(s)); err != nil {
		return fmt.Errorf("CNI CHECK of %s: %w", s.name(), err)
	}
	return nil
}

// gc has the plugins forget all sandboxes but these.
func (n *network) gc(ctx context.Context, valid []*sandbox) error {
	list, err := n.config()
	if err != nil {
		return err
	}
	args := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}}
	for _, s := range valid {
		args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: s.ID, IfName: ifName})
	}
	if err := n.cni.GCNetworkList(ctx, list, args); err != nil {
		return fmt.Errorf("CNI GC: %w", err)
	}
	return nil
}

// addNetNS makes a network namespace, with its loopback up, that ip netns knows by the name.
func addNetNS(path string) (err error) {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("making the network namespace %s: %w", path, err), os.Remove(path))
		}
	}()
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := loopbackUp(); err != nil {
			return fmt.Errorf("taking its loopback up: %w", err)
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	})
}

func delNetNS(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the network namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the network namespace %s: %w", path, err)
	}
	return nil
}

// inNetNS calls do in the network namespace at path, "" for this process's.
func inNetNS(path string, do func() error) error {
	if path == "" {
		return do()
	}
	return onThread(func() error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("entering %s: %w", filepath.Base(path), err)
		}
		return do()
	})
}

// onThread calls do on a thread of its own, which ends afterwards: it may have changed its namespaces.
func onThread(do func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked
		done <- do()
	}()
	return <-done
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
}
