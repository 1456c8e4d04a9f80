package datapath_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"causeway/datapath"
	"causeway/identity"
	"causeway/tunnel"
)

func TestMain(m *testing.M) {
	serveIfAsked()
	if os.Getuid() != 0 {
		fmt.Fprintln(os.Stderr, "LEFT OUT: every test of the data path in the kernel, because they need root.")
		if os.Getenv("CI") == "true" {
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
}

// namespace is a network namespace without a name, which goes when it is closed.
type namespace struct{ handle netns.NsHandle }

func newNamespace(t testing.TB) namespace {
	t.Helper()
	ns := namespace{}
	onThread(func() {
		var err error
		if ns.handle, err = netns.New(); err != nil {
			t.Errorf("making a network namespace: %v", err)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	t.Cleanup(func() { ns.handle.Close() })
	return ns
}

// do runs f on a thread that is in the namespace.
func (n namespace) do(t testing.TB, f func()) {
	t.Helper()
	onThread(func() {
		if err := netns.Set(n.handle); err != nil {
			t.Errorf("entering a network namespace: %v", err)
			return
		}
		f()
	})
}

// path names the namespace for this process.
func (n namespace) path() string { return fmt.Sprintf("/proc/self/fd/%d", int(n.handle)) }

// onThread runs f on a thread of its own, which ends with f.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		f()
	}()
	<-done
}

// mesh is a few nodes on one underlay, with real devices in namespaces of their own.
type mesh struct {
	t        testing.TB
	underlay namespace
	nodes    []*node
	options  options
}

type options struct {
	clsact bool
	// bare leaves out the data path.
	bare bool
	// encrypted: nodes and pods are made for WireGuard between all nodes; see newEncryptedMesh.
	encrypted bool
	// outside: nodes take what comes to services from outside of the mesh; see outside_test.go.
	outside bool
	// underlay6: the underlay is of IPv6.
	underlay6 bool
	// ranges are the address families of the nodes' pod ranges, in their order; none: IPv4.
	ranges []int
}

// eachFamily runs a test in a mesh that is of IPv4 throughout, and in one of IPv6.
func eachFamily(t *testing.T, test func(t *testing.T, opts options)) {
	t.Run("IPv4", func(t *testing.T) { test(t, options{}) })
	t.Run("IPv6", func(t *testing.T) { test(t, allIPv6) })
}

var allIPv6 = options{underlay6: true, ranges: []int{6}}

// eachWay runs a test for each attachment and address family.
func eachWay(t *testing.T, test func(t *testing.T, opts options)) {
	eachAttachment(t, func(t *testing.T, attachment options) {
		eachFamily(t, func(t *testing.T, opts options) {
			opts.clsact = attachment.clsact
			test(t, opts)
		})
	})
}

// underlayAddress is that of a node, by its cluster and number.
func (o options) underlayAddress(id identity.ClusterID, i int) netip.Addr {
	if o.underlay6 {
		return netip.MustParseAddr(fmt.Sprintf("fd00:29::%x:%x", int(id), 10+i))
	}
	return netip.AddrFrom4([4]byte{172, 29, byte(id), byte(10 + i)})
}

// podRanges are those of a node, by its cluster and number.
func (o options) podRanges(id identity.ClusterID, i int) (ranges []netip.Prefix) {
	for _, family := range o.ranges {
		if family == 6 {
			ranges = append(ranges, netip.MustParsePrefix(fmt.Sprintf("fd00:10:%x:%x::/64", int(id), i)))
		} else {
			ranges = append(ranges, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(id), byte(i), 0}), 24))
		}
	}
	return ranges
}

type node struct {
	mesh    *mesh
	ns      namespace
	row     identity.Node
	port    string // name of the bridge's port
	device  tunnel.Device
	config  datapath.Config
	dp      *datapath.Datapath
	routes  *tunnel.Routes
	pods    []*pod
	cgroups string
	// wireGuard is the name of the node's WireGuard devices, less the slot's number; empty: it has none.
	wireGuard string
}

type pod struct {
	node *node
	ns   namespace
	row  identity.Endpoint
	link datapath.PodLink
}

func (p *pod) addr() netip.Addr { return p.row.Address }

// underlayMTU is that of the links between the nodes, in bytes.
const underlayMTU = 1500

// podMTU is what an underlay of IPv4 leaves to pods.
const podMTU = 1450

// podMTU is what the underlay leaves to pods, whether tunnels end at its addresses or at tunnel addresses.
func (o options) podMTU() int {
	if o.encrypted {
		return tunnel.EncryptedPodMTU(underlayMTU, o.underlayAddress(1, 1), o.podRanges(1, 1)[0].Addr())
	}
	if o.underlay6 || len(o.ranges) > 0 && o.ranges[0] == 6 {
		return podMTU - 20
	}
	return podMTU
}

// newMesh makes a node for each cluster ID, on an underlay with an MTU of 1500.
func newMesh(t testing.TB, opts options, clusters ...identity.ClusterID) *mesh {
	t.Helper()
	needRoot(t)
	if opts.ranges == nil {
		opts.ranges = []int{4}
	}
	m := &mesh{t: t, underlay: newNamespace(t), options: opts}
	m.underlay.do(t, func() {
		must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs("br0")}))
		up(t, "br0")
	})
	for i, id := range clusters {
		m.addNode(i, id)
	}
	for _, n := range m.nodes {
		n.awaitUnderlay()
		n.learn()
	}
	return m
}

// awaitUnderlay waits until the bridge forwards for the node, which takes up to a second after its link came up.
func (n *node) awaitUnderlay() {
	t := n.mesh.t
	t.Helper()
	for _, other := range n.mesh.nodes {
		to := netip.AddrPortFrom(other.row.Address, 9)
		n.ns.do(t, func() {
			for range 200 {
				// Nobody listens there; that it is refused says that it got there.
				if _, err := net.DialTimeout("tcp", to.String(), 20*time.Millisecond); errors.Is(err, unix.ECONNREFUSED) {
					return
				}
			}
			t.Errorf("%s doesn't reach %s on the underlay", n.row.Name, to)
		})
	}
}

func (m *mesh) addNode(i int, id identity.ClusterID) {
	t := m.t
	t.Helper()
	n := &node{mesh: m, ns: newNamespace(t), port: fmt.Sprintf("port%d", i), row: identity.Node{
		Cluster: fmt.Sprintf("cluster%d", id), ClusterID: id, Name: fmt.Sprintf("node%d", i),
		Address:  m.options.underlayAddress(id, i),
		PodCIDRs: m.options.podRanges(id, i),
	}}
	m.nodes = append(m.nodes, n)
	m.underlay.do(t, func() {
		must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs(n.port), PeerName: "eth0", PeerNamespace: netlink.NsFd(int(n.ns.handle))}))
		br, err := netlink.LinkByName("br0")
		must(t, err)
		port, err := netlink.LinkByName(n.port)
		must(t, err)
		must(t, netlink.LinkSetMaster(port, br))
		up(t, n.port)
	})
	n.ns.do(t, func() {
		up(t, "lo")
		up(t, "eth0")
		eth0, err := netlink.LinkByName("eth0")
		must(t, err)
		bits := 16
		if n.row.Address.Is6() {
			bits = 64
		}
		must(t, netlink.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(n.row.Address, bits)), Flags: unix.IFA_F_NODAD}))
	})
	if m.options.bare {
		return
	}
	n.ns.do(t, func() {
		cfg := tunnel.Config{Address: n.row.Address}
		if m.options.encrypted {
			cfg.MTU = m.options.podMTU()
		}
		var err error
		n.device, err = tunnel.EnsureVXLAN(cfg)
		must(t, err)
		sysctl(t, "net/ipv6/conf/"+tunnel.DefaultName+"/addr_gen_mode", "1")
		sysctl(t, "net/ipv6/conf/"+tunnel.DefaultName+"/disable_ipv6", "0")
		n.routes, err = tunnel.NewRoutes(n.device, n.row.Address)
		must(t, err)
	})
	t.Cleanup(func() { n.routes.Close() })
	n.cgroups = newCgroup(t)
	n.config = datapath.Config{
		PinDir: filepath.Join(mountBPF(t), "causeway"), CgroupPath: n.cgroups, ClusterID: id, NodeAddress: n.row.Address, PodSide: n.row.PodSide(),
		VXLANIndex: n.device.Index, PodMTU: m.options.podMTU(), ForceClsact: m.options.clsact,
	}
	if sides := n.row.PodSides(); len(sides) > 1 {
		n.config.PodSideOther = sides[1]
	}
	if m.options.encrypted {
		n.config.Tunnel = [identity.TunnelSlots]netip.Addr{n.row.TunnelAddress(0), n.row.TunnelAddress(1)}
	}
	if m.options.encrypted || m.options.outside {
		n.config.UnderlayIndex = n.linkIndex("eth0")
	}
	n.load()
	t.Cleanup(func() { must(t, n.dp.Close()) })
}

// load loads the data path, as an agent does that starts.
func (n *node) load() {
	t := n.mesh.t
	t.Helper()
	n.ns.do(t, func() {
		var err error
		n.dp, err = datapath.Load(n.config)
		must(t, err)
	})
	if t.Failed() {
		t.FailNow()
	}
}

// learn tells the node of all others.
func (n *node) learn() {
	ctx := context.Background()
	for _, other := range n.mesh.nodes {
		if n.mesh.options.bare || other == n {
			continue
		}
		must(n.mesh.t, n.dp.Tunnels().Update(ctx, n.tunnelTo(other)))
		must(n.mesh.t, n.routes.Update(ctx, n.ownRoutes(other)))
		n.ns.do(n.mesh.t, func() { n.routeIPv6(other) })
		must(n.mesh.t, n.dp.Addresses().Update(ctx, other.address()))
	}
}

// ownRoutes is tunnelTo with the ranges that the node's own processes reach, which are of its address's family.
func (n *node) ownRoutes(other *node) identity.Tunnel {
	row := n.tunnelTo(other)
	row.PodCIDRs = slices.DeleteFunc(slices.Clone(row.PodCIDRs), func(p netip.Prefix) bool { return p.Addr().Is4() != n.row.Address.Is4() })
	return row
}

// routeIPv6 makes the other's IPv6 ranges reachable for the node's own processes.
func (n *node) routeIPv6(other *node) {
	for _, p := range other.row.PodCIDRs {
		if p.Addr().Is6() && n.row.Address.Is6() {
			must(n.mesh.t, netlink.RouteReplace(&netlink.Route{LinkIndex: n.device.Index, Dst: ipNet(p), Src: n.row.Address.AsSlice()}))
		}
	}
}

// tunnelTo is the row of the way to another node, on the underlay.
func (n *node) tunnelTo(other *node) identity.Tunnel {
	return identity.Tunnel{
		Cluster: other.row.Cluster, ClusterID: other.row.ClusterID, Node: other.row.Name, Mode: identity.TunnelPlain, Address: other.row.Address,
		PodCIDRs: other.row.PodCIDRs, Local: n.row.Address, Remote: other.row.Address, MTU: n.mesh.options.podMTU(),
	}
}

// learnRanges tells every node whose the pod ranges are, its own included.
func (m *mesh) learnRanges() {
	m.t.Helper()
	for _, n := range m.nodes {
		for _, owner := range m.nodes {
			must(m.t, n.dp.Addresses().Update(context.Background(), owner.podRange()))
		}
	}
}

// podRange is the row of the node's first pod range.
func (n *node) podRange() identity.Address {
	a := n.address()
	a.Prefix, a.Identity = n.row.PodCIDRs[0], identity.Unknown
	return a
}

// inRange returns an address of the node's first pod range, by its last byte.
func (n *node) inRange(last byte) netip.Addr { return inRange(n.row.PodCIDRs[0], last) }

func inRange(p netip.Prefix, last byte) netip.Addr {
	b := p.Addr().AsSlice()
	b[len(b)-1] = last
	a, _ := netip.AddrFromSlice(b)
	return a
}

// addPod connects a pod to the node, with an address of each of its ranges, and makes all nodes know it.
func (n *node) addPod(local uint16) *pod {
	t := n.mesh.t
	t.Helper()
	p := &pod{node: n, ns: newNamespace(t)}
	number := byte(10 + len(n.pods))
	p.row = identity.Endpoint{
		Namespace: "default", Name: fmt.Sprintf("pod%d", len(n.pods)), Address: n.inRange(number),
		Identity: identity.Compose(n.row.ClusterID, local), HostLink: fmt.Sprintf("cw%d", len(n.pods)), MTU: n.mesh.options.podMTU(),
	}
	if len(n.row.PodCIDRs) > 1 {
		p.row.Address6 = inRange(n.row.PodCIDRs[1], number)
	}
	n.pods = append(n.pods, p)
	n.ns.do(t, func() {
		var err error
		p.link, err = datapath.CreatePodLink(datapath.PodLinkConfig{
			NetNS: p.ns.path(), HostLink: p.row.HostLink, Address: p.row.Address, Address6: p.row.Address6, MTU: p.row.MTU,
		})
		must(t, err)
		p.row.IfIndex, p.row.MAC, p.row.HostMAC = p.link.IfIndex, p.link.MAC, p.link.HostMAC
		must(t, n.dp.Endpoints().Update(context.Background(), p.row))
	})
	for _, other := range n.mesh.nodes {
		p.tell(other)
	}
	return p
}

// tell makes a node know the pod's addresses.
func (p *pod) tell(n *node) {
	for _, a := range p.row.Addresses() {
		row := p.address()
		row.Prefix = netip.PrefixFrom(a, a.BitLen())
		must(n.mesh.t, n.dp.Addresses().Update(context.Background(), row))
	}
}

// address is the row of the node's own address.
func (n *node) address() identity.Address {
	return identity.Address{
		Cluster: n.row.Cluster, ClusterID: n.row.ClusterID, Prefix: netip.PrefixFrom(n.row.Address, n.row.Address.BitLen()),
		Identity: identity.RemoteNode, Node: n.row.Name, NodeAddress: n.row.Address,
	}
}

// address is the pod's row of the addresses table, of its first address.
func (p *pod) address() identity.Address {
	return identity.Address{
		Cluster: p.node.row.Cluster, ClusterID: p.node.row.ClusterID, Prefix: netip.PrefixFrom(p.row.Address, p.row.Address.BitLen()),
		Identity: p.row.Identity, Node: p.node.row.Name, NodeAddress: p.node.row.Address, Endpoint: p.row.ID(),
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// drops returns how many packets the node has dropped for the reason.
func (n *node) drops(reason string) (packets uint64) {
	all, err := n.dp.Drops()
	must(n.mesh.t, err)
	for _, d := range all {
		if d.Reason == reason {
			packets += d.Packets
		}
	}
	return packets
}

func attrs(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

func up(t testing.TB, name string) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	must(t, err)
	must(t, netlink.LinkSetUp(link))
}

// mountBPF mounts a bpf file system for the test.
func mountBPF(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatalf("mounting a bpf file system: %v", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

func newCgroup(t testing.TB) string {
	t.Helper()
	root, err := datapath.CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(root, "causeway-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(t, os.Remove(dir)) })
	return dir
}

// join puts this process into the node's cgroup until the test ends, so that its sockets are translated.
func (n *node) join() {
	t := n.mesh.t
	t.Helper()
	root, err := datapath.CgroupRoot()
	must(t, err)
	own, err := os.ReadFile("/proc/self/cgroup")
	must(t, err)
	home := root
	for line := range strings.Lines(string(own)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			home = filepath.Join(root, strings.TrimSpace(path))
		}
	}
	must(t, os.WriteFile(filepath.Join(n.cgroups, "cgroup.procs"), []byte("0"), 0o644))
	t.Cleanup(func() { must(t, os.WriteFile(filepath.Join(home, "cgroup.procs"), []byte("0"), 0o644)) })
}

// must reports an error without ending the goroutine, which may not be the test's.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Errorf("%v", err)
	}
}

// sysctl sets a sysctl of the thread's network namespace.
func sysctl(t testing.TB, name, value string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0o644))
}
