package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/statedb"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sync/errgroup"

	"causeway/agent/api"
	"causeway/clustermesh"
	"causeway/datapath"
	"causeway/identity"
	"causeway/k8s/cni"
	"causeway/kvstore"
)

// Environment of the test's own binary when it is the plugin: how long it tries again, and the directory of the links where the kernel is a fake.
const (
	pluginPatience = "CAUSEWAY_TEST_CNI_PATIENCE"
	pluginLinks    = "CAUSEWAY_TEST_CNI_LINKS"
)

// runTestPlugin is what the program does that a runtime finds under the plugin's name.
func runTestPlugin() int {
	patience, err := time.ParseDuration(os.Getenv(pluginPatience))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	p := &cni.Plugin{Version: "test", Patience: patience, Remove: datapath.DeletePodEnd, Look: func(netns, name string) (cni.Interface, error) {
		end, err := datapath.LookAtPodEnd(netns, name)
		return cni.Interface(end), err
	}}
	if dir := os.Getenv(pluginLinks); dir != "" {
		links := fileLinks{dir}
		p.Look, p.Remove = links.look, links.remove
	}
	return p.Run()
}

// fileLinks are pods' links that exist as files in a directory, named by the node's end, so that agent and plugin see the same.
type fileLinks struct{ dir string }

type fileLink struct {
	NetNS, Name string
	End         cni.Interface
}

func (f fileLinks) Create(ep identity.Endpoint) (datapath.PodLink, error) {
	link := fileLink{NetNS: ep.NetNS, Name: ep.Interface, End: cni.Interface{MAC: "02:00:00:00:00:02", MTU: ep.MTU, Up: true, Addresses: ep.Addresses()}}
	for _, a := range ep.Addresses() {
		link.End.Gateways = append(link.End.Gateways, datapath.PodGateway(a))
	}
	return datapath.PodLink{IfIndex: 7, HostMAC: "02:00:00:00:00:01", MAC: link.End.MAC}, f.write(ep.HostLink, link)
}

func (f fileLinks) write(hostLink string, link fileLink) error {
	data, err := json.Marshal(link)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(f.dir, hostLink), data, 0o600)
}

func (f fileLinks) Find(hostLink string) (datapath.PodLink, bool, error) {
	_, err := os.Stat(filepath.Join(f.dir, hostLink))
	if errors.Is(err, fs.ErrNotExist) {
		return datapath.PodLink{}, false, nil
	}
	return datapath.PodLink{IfIndex: 7, HostMAC: "02:00:00:00:00:01"}, err == nil, err
}

func (f fileLinks) Repair(identity.Endpoint) error { return nil }

func (f fileLinks) Delete(hostLink string) error {
	if err := os.Remove(filepath.Join(f.dir, hostLink)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// find returns the link that a pod's end is of, by the name of the node's.
func (f fileLinks) find(netns, name string) (string, fileLink, error) {
	for _, hostLink := range f.names() {
		data, err := os.ReadFile(filepath.Join(f.dir, hostLink))
		if err != nil {
			return "", fileLink{}, err
		}
		var link fileLink
		if err := json.Unmarshal(data, &link); err != nil {
			return "", fileLink{}, err
		}
		if link.NetNS == netns && link.Name == name {
			return hostLink, link, nil
		}
	}
	return "", fileLink{}, fmt.Errorf("%s in %s: %w", name, netns, fs.ErrNotExist)
}

func (f fileLinks) names() (names []string) {
	entries, _ := os.ReadDir(f.dir)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func (f fileLinks) look(netns, name string) (cni.Interface, error) {
	_, link, err := f.find(netns, name)
	return link.End, err
}

func (f fileLinks) remove(netns, name string) error {
	hostLink, _, err := f.find(netns, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return errors.Join(err, f.Delete(hostLink))
}

// fakePods are the pods that an API server has told of.
type fakePods struct {
	mu     sync.Mutex
	labels map[string]identity.Labels // by NAMESPACE/NAME
	uids   map[string]string
	// asked is called, if set, before each answer.
	asked func(id string)
}

func (f *fakePods) set(id, uid string, labels identity.Labels) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.labels[id], f.uids[id] = labels, uid
}

func (f *fakePods) PodLabels(_ context.Context, namespace, name, uid string) (identity.Labels, error) {
	id := namespace + "/" + name
	if f.asked != nil {
		f.asked(id)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	labels, ok := f.labels[id]
	if !ok || uid != "" && uid != f.uids[id] {
		return nil, errors.New("the API server has told of no such pod on this node")
	}
	return labels, nil
}

// cniNode is an agent without a kernel, but for links, that answers on its socket, and a container runtime before it.
type cniNode struct {
	cfg    Config
	store  *kvstore.Memory
	links  podLinks
	source *fakePods
	tables *clustermesh.Tables
	pods   *endpoints
	stop   func()

	runtime *libcni.CNIConfig
	// conf is more of the plugin's object, as in `"logLevel":"debug"`.
	conf, version string
}

func newCNINode(t *testing.T) *cniNode {
	t.Helper()
	cfg := dualStackConfig(t)
	cfg.Socket = filepath.Join(t.TempDir(), "agent.sock")
	links := t.TempDir()
	t.Setenv(pluginLinks, links)
	t.Setenv(pluginPatience, patience.String())
	return &cniNode{
		cfg: cfg, store: kvstore.NewMemory(), links: fileLinks{links}, version: "1.1.0",
		source:  &fakePods{labels: map[string]identity.Labels{"default/shop-1": {"app": "shop"}}, uids: map[string]string{"default/shop-1": "uid-1"}},
		runtime: newRuntime(t),
	}
}

// newRuntime returns a container runtime's library, which finds the test's own binary as the plugin.
func newRuntime(t *testing.T) *libcni.CNIConfig {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	if err := os.Symlink(self, filepath.Join(bin, cni.Name)); err != nil {
		t.Fatal(err)
	}
	return libcni.NewCNIConfigWithCacheDir([]string{bin}, t.TempDir(), nil)
}

// start begins a life of the agent's, which ends with the test or by stop.
func (n *cniNode) start(t *testing.T) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	listener, err := listen(n.cfg.Socket)
	if err != nil {
		t.Fatal(err)
	}
	n.tables = newTables(t)
	n.pods = newEndpoints(n.tables, identity.NewAllocator(n.store, "east", 1, "node1", log), n.cfg, 1390, log)
	n.pods.links = n.links
	if n.source != nil {
		n.pods.source = n.source
	}
	if err := n.pods.Restore(); err != nil {
		t.Fatal(err)
	}
	api := (&server{tables: &view{tables: n.tables}, endpoints: n.pods, agent: &agent{}}).handler()
	ctx, cancel := context.WithCancel(context.Background())
	tasks, ctx := errgroup.WithContext(ctx)
	tasks.Go(func() error { return serve(ctx, listener, api) })
	tasks.Go(func() error { return n.pods.Run(ctx) })
	tasks.Go(func() error {
		return newReconciler("endpoints", n.tables, n.tables.Endpoints, agreeable[identity.Endpoint]{}, func(identity.ClusterID) bool { return true }, log).Run(ctx)
	})
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := tasks.Wait(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(n.stop)
}

func (n *cniNode) restart(t *testing.T) {
	t.Helper()
	n.stop()
	n.start(t)
}

func (n *cniNode) network(t *testing.T) *libcni.NetworkConfigList {
	t.Helper()
	list, err := libcni.NetworkConfFromBytes(fmt.Appendf(nil, `{"cniVersion":%q,"name":"causeway","plugins":[{"type":"causeway-cni","socket":%q%s}]}`, n.version, n.cfg.Socket, n.conf))
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// sandbox is a pod's, as a kubelet has the runtime make it.
func sandbox(t *testing.T, id, pod, uid string) *libcni.RuntimeConf {
	t.Helper()
	netns := filepath.Join(t.TempDir(), id)
	if err := os.WriteFile(netns, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return sandboxAt(netns, id, pod, uid)
}

func sandboxAt(netns, id, pod, uid string) *libcni.RuntimeConf {
	namespace, name, _ := strings.Cut(pod, "/")
	return &libcni.RuntimeConf{ContainerID: id, NetNS: netns, IfName: "eth0", Args: [][2]string{
		{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", namespace}, {"K8S_POD_NAME", name}, {"K8S_POD_INFRA_CONTAINER_ID", id}, {"K8S_POD_UID", uid},
	}}
}

func (n *cniNode) tryAdd(t *testing.T, s *libcni.RuntimeConf) (*types100.Result, error) {
	t.Helper()
	result, err := n.runtime.AddNetworkList(t.Context(), n.network(t), s)
	if err != nil {
		return nil, err
	}
	return types100.NewResultFromResult(result)
}

func (n *cniNode) add(t *testing.T, s *libcni.RuntimeConf) *types100.Result {
	t.Helper()
	result, err := n.tryAdd(t, s)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

func (n *cniNode) del(t *testing.T, s *libcni.RuntimeConf) {
	t.Helper()
	if err := n.runtime.DelNetworkList(t.Context(), n.network(t), s); err != nil {
		t.Errorf("DEL of %s: %v", s.ContainerID, err)
	}
}

func (n *cniNode) check(t *testing.T, s *libcni.RuntimeConf) error {
	t.Helper()
	return n.runtime.CheckNetworkList(t.Context(), n.network(t), s)
}

// sandboxes lists the pods that the agent has, as POD=SANDBOX.
func (n *cniNode) sandboxes() string {
	var all []string
	for row := range n.tables.Endpoints.All(n.tables.DB.ReadTxn()) {
		all = append(all, row.Object.ID()+"="+row.Object.Sandbox)
	}
	return strings.Join(all, " ")
}

// refused asserts the code that the CNI specification has for an error, and a part of its text.
func refused(t *testing.T, what string, err error, code uint, text string) {
	t.Helper()
	var refusal *types.Error
	if !errors.As(err, &refusal) || refusal.Code != code || !strings.Contains(refusal.Error(), text) {
		t.Errorf("%s: %#v, want code %d and %q", what, err, code, text)
	}
}

func TestCNIResultInEveryVersion(t *testing.T) {
	n := newCNINode(t)
	n.start(t)
	info, err := n.runtime.GetVersionInfo(t.Context(), cni.Name)
	want := []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}
	if err != nil || !slices.Equal(info.SupportedVersions(), want) {
		t.Fatalf("supported are %v (%v), want %v", info, err, want)
	}
	for _, version := range want {
		n.version = version
		s := sandbox(t, "sandbox-"+version, "default/shop-1", "uid-1")
		got := n.add(t, s)
		ep, _ := n.pods.get("default/shop-1")
		var interfaces, ips, routes []string
		for _, i := range got.Interfaces {
			interfaces = append(interfaces, fmt.Sprintf("%s %s %d %s", i.Name, i.Mac, i.Mtu, i.Sandbox))
		}
		for _, ip := range got.IPs {
			ips = append(ips, fmt.Sprintf("%s by %s on %d", ip.Address.String(), ip.Gateway, *ip.Interface))
		}
		for _, r := range got.Routes {
			routes = append(routes, fmt.Sprintf("%s by %s", r.Dst.String(), r.GW))
		}
		mtu := ep.MTU
		if version < "1.0.0" {
			mtu = 0 // results have none
		}
		if fmt.Sprint(interfaces) != fmt.Sprintf("[%s 02:00:00:00:00:01 %d  eth0 02:00:00:00:00:02 %d %s]", ep.HostLink, mtu, mtu, s.NetNS) ||
			fmt.Sprint(ips) != fmt.Sprintf("[%s/32 by 169.254.1.1 on 1 %s/128 by fe80::1 on 1]", ep.Address, ep.Address6) ||
			fmt.Sprint(routes) != "[0.0.0.0/0 by 169.254.1.1 ::/0 by fe80::1]" || !got.DNS.IsEmpty() {
			t.Errorf("version %s: %s, %s, %s, DNS %+v", version, interfaces, ips, routes, got.DNS)
		}
		if version >= "0.4.0" {
			if err := n.check(t, s); err != nil {
				t.Errorf("CHECK in version %s: %v", version, err)
			}
		}
	}
	n.version = "2.0.0"
	_, err = n.tryAdd(t, sandbox(t, "sandbox-x", "default/shop-1", "uid-1"))
	refused(t, "a version that is not known", err, types.ErrIncompatibleCNIVersion, "incompatible")
}

func TestCNIPodsHaveTheLabelsThatKubernetesKnows(t *testing.T) {
	n := newCNINode(t)
	n.start(t)
	long := strings.Repeat("a.b", 84)
	n.source.set("web/"+long, "uid-2", identity.Labels{"app": "cart"})
	n.add(t, sandbox(t, "one", "web/"+long, "uid-2"))
	ep, ok := n.pods.get("web/" + long)
	if !ok || ep.Labels.String() != "app=cart,io.kubernetes.pod.namespace=web" || ep.Identity.Cluster() != 1 || ep.State != identity.EndpointReady || ep.UID != "uid-2" {
		t.Errorf("the endpoint is %+v", ep)
	}
	// Whether a pod of Kubernetes is a backend is not for the local API to say.
	if _, err := n.pods.SetState(ep.ID(), identity.EndpointNotReady); err == nil || !strings.Contains(err.Error(), "EndpointSlices") {
		t.Errorf("its state was changed: %v", err)
	}
}

func TestCNIAddAgainIsTheSameAlsoAfterARestart(t *testing.T) {
	n := newCNINode(t)
	n.start(t)
	s := sandbox(t, "one", "default/shop-1", "uid-1")
	first := n.add(t, s)
	same := func(when string) {
		t.Helper()
		got, want := n.add(t, s), first
		if !reflect.DeepEqual(got, want) || n.sandboxes() != "default/shop-1=one" {
			t.Errorf("%s: %+v, want %+v; the agent has %s", when, got, want, n.sandboxes())
		}
	}
	same("again")
	n.store.Disconnect()
	n.source.labels = nil // the API server is away, too
	n.restart(t)
	same("after a restart")
	if err := n.check(t, s); err != nil {
		t.Errorf("CHECK after a restart: %v", err)
	}
	if err := os.Remove(filepath.Join(n.links.(fileLinks).dir, n.pods.byID["default/shop-1"].HostLink)); err != nil {
		t.Fatal(err)
	}
	same("after somebody has removed its link")
	if err := n.check(t, s); err != nil {
		t.Errorf("CHECK after that: %v", err)
	}
	other := *s
	other.IfName = "net1"
	_, err := n.tryAdd(t, &other)
	refused(t, "a second interface", err, types.ErrInternal, "a pod has one interface")
}

func TestCNIAnotherSandboxTakesThePlace(t *testing.T) {
	n := newCNINode(t)
	n.start(t)
	one, two := sandbox(t, "one", "default/shop-1", "uid-1"), sandbox(t, "two", "default/shop-1", "uid-2")
	before := n.add(t, one)
	n.source.set("default/shop-1", "uid-2", identity.Labels{"app": "shop", "version": "2"}) // as a StatefulSet's pod comes again
	after := n.add(t, two)
	if n.sandboxes() != "default/shop-1=two" || after.IPs[0].Address.IP.Equal(before.IPs[0].Address.IP) {
		t.Errorf("the agent has %s at %s, before it was at %s", n.sandboxes(), after.IPs[0].Address.IP, before.IPs[0].Address.IP)
	}
	if _, _, err := n.links.(fileLinks).find(one.NetNS, "eth0"); err == nil {
		t.Error("the former sandbox still has its link")
	}
	if used := used(t, n.store); used != 1 {
		t.Errorf("%d identities are in use, want the new labels' alone", used)
	}
	n.del(t, one) // comes late
	if err := n.check(t, two); err != nil || n.sandboxes() != "default/shop-1=two" {
		t.Errorf("after DEL of the former sandbox the agent has %s, CHECK says %v", n.sandboxes(), err)
	}
	t.Setenv(pluginPatience, "100ms")
	_, err := n.tryAdd(t, one) // comes even later, when its pod is gone
	refused(t, "ADD of the former sandbox", err, types.ErrTryAgainLater, "told of no such pod")
	if err := os.Remove(one.NetNS); err != nil {
		t.Fatal(err)
	}
	_, err = n.tryAdd(t, one)
	refused(t, "ADD of a sandbox without a network namespace", err, types.ErrInvalidEnvironmentVariables, "does not exist")
	n.del(t, two)
	if n.sandboxes() != "" || len(n.links.(fileLinks).names()) != 0 || used(t, n.store) != 0 {
		t.Errorf("after DEL there are %q, links %q and %d identities in use", n.sandboxes(), n.links.(fileLinks).names(), used(t, n.store))
	}
	n.del(t, two)
}

func TestCNICheckSeesWhatIsNotAsItWas(t *testing.T) {
	n := newCNINode(t)
	n.start(t)
	s := sandbox(t, "one", "default/shop-1", "uid-1")
	n.add(t, s)
	links := n.links.(fileLinks)
	hostLink, made, err := links.find(s.NetNS, "eth0")
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		change func(*cni.Interface)
		want   string // empty: it is fine
	}{
		{func(i *cni.Interface) { i.MTU = 1280 }, ""},
		{func(i *cni.Interface) {
			i.Addresses, i.Gateways = append(i.Addresses, netip.MustParseAddr("192.0.2.7")), []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("fd00::1")}
		}, ""},
		{func(i *cni.Interface) { i.MAC = "02:00:00:00:00:09" }, "has the MAC 02:00:00:00:00:09, want 02:00:00:00:00:02"},
		{func(i *cni.Interface) { i.MTU = 1500 }, "MTU of 1500 bytes, the mesh carries 1390"},
		{func(i *cni.Interface) { i.Up = false }, "is not up"},
		{func(i *cni.Interface) { i.Addresses = i.Addresses[:1] }, "has lost the address fd00:10:0:1::2"},
		{func(i *cni.Interface) { i.Gateways = i.Gateways[1:] }, "has lost the default route for 10.1.1.4"},
	} {
		link := made
		link.End.Addresses, link.End.Gateways = slices.Clone(made.End.Addresses), slices.Clone(made.End.Gateways)
		test.change(&link.End)
		if err := links.write(hostLink, link); err != nil {
			t.Fatal(err)
		}
		if err := n.check(t, s); test.want != "" {
			refused(t, test.want, err, types.ErrInternal, test.want)
		} else if err != nil {
			t.Errorf("%+v: %v", link.End, err)
		}
	}
	if err := links.Delete(hostLink); err != nil {
		t.Fatal(err)
	}
	refused(t, "without its link", n.check(t, s), types.ErrInvalidNetNS, "eth0")

	// The agent has it anew, and the runtime does not know.
	if err := n.pods.Delete(t.Context(), "default/shop-1"); err != nil {
		t.Fatal(err)
	}
	refused(t, "without its endpoint", n.check(t, s), types.ErrUnknownContainer, "no pod of sandbox one")
	if _, err := n.pods.Add(t.Context(), api.EndpointRequest{Name: "shop-1", Sandbox: "one", NetNS: s.NetNS}); err != nil {
		t.Fatal(err)
	}
	refused(t, "with another address", n.check(t, s), types.ErrInternal, "its address 10.1.1.5 is not what the runtime was told")
}

func TestCNIGarbageIsCollected(t *testing.T) {
	n := newCNINode(t)
	n.start(t)
	byHand := api.EndpointRequest{Name: "by-hand", NetNS: "/proc/self/ns/net", Labels: map[string]string{"app": "a"}}
	if _, err := n.pods.Add(t.Context(), byHand); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kept", "gone", "other-interface"} {
		n.source.set("default/"+name, "", identity.Labels{"app": name})
		n.add(t, sandbox(t, name, "default/"+name, ""))
	}
	valid := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "kept", IfName: "eth0"}, {ContainerID: "other-interface", IfName: "net1"}, {ContainerID: "unknown", IfName: "eth0"}}}
	for range 2 {
		if err := n.runtime.GCNetworkList(t.Context(), n.network(t), valid); err != nil {
			t.Fatal(err)
		}
		if got := n.sandboxes(); got != "default/by-hand= default/kept=kept" {
			t.Errorf("after GC the agent has %s", got)
		}
	}
	n.stop()
	err := n.runtime.GCNetworkList(t.Context(), n.network(t), valid)
	if err == nil || !strings.Contains(err.Error(), "no agent is running") {
		t.Errorf("GC without an agent: %v", err)
	}
}

func TestCNIStatus(t *testing.T) {
	n := newCNINode(t)
	status := func() error { return n.runtime.GetStatusNetworkList(t.Context(), n.network(t)) }
	refused(t, "without an agent", status(), types.ErrPluginNotAvailable, "no agent is running at "+n.cfg.Socket)
	n.cfg.Node.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.1.1.0/29")}
	n.start(t)
	if err := status(); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"a", "b", "c"} { // as many as there are addresses
		n.source.set("default/"+name, "", identity.Labels{"app": name})
		n.add(t, sandbox(t, name, "default/"+name, ""))
	}
	refused(t, "without addresses", status(), types.ErrPluginNotAvailable, "all addresses of this node's pod range 10.1.1.0/29 are taken")
	n.source = nil
	n.restart(t)
	refused(t, "without Kubernetes", status(), types.ErrPluginNotAvailable, "in no Kubernetes cluster")
	_, err := n.tryAdd(t, sandbox(t, "one", "default/shop-1", "uid-1"))
	refused(t, "ADD without Kubernetes", err, types.ErrInvalidNetworkConfig, "set kubernetes.kubeconfig")
}

// TestCNIWithoutAnAgent: pods go although nobody is there to be told, for good, and none comes.
func TestCNIWithoutAnAgent(t *testing.T) {
	n := newCNINode(t)
	n.start(t)
	stays, goes, went := sandbox(t, "stays", "default/shop-1", "uid-1"), sandbox(t, "goes", "default/goes", ""), sandbox(t, "went", "default/went", "")
	for _, s := range []*libcni.RuntimeConf{stays, goes, went} {
		n.source.set("default/"+s.ContainerID, "", identity.Labels{"app": s.ContainerID})
		n.add(t, s)
	}
	n.stop()
	n.del(t, goes)
	n.del(t, goes)
	hostLink, _, err := n.links.(fileLinks).find(went.NetNS, "eth0") // a link goes with its network namespace
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(n.links.Delete(hostLink), os.Remove(went.NetNS)); err != nil {
		t.Fatal(err)
	}
	went.NetNS = ""
	n.del(t, went)
	if len(n.links.(fileLinks).names()) != 1 {
		t.Errorf("links are %q, want that of the pod that stays", n.links.(fileLinks).names())
	}
	t.Setenv(pluginPatience, "100ms")
	_, err = n.tryAdd(t, sandbox(t, "new", "default/shop-1", "uid-1"))
	refused(t, "ADD", err, types.ErrTryAgainLater, "no agent is running at "+n.cfg.Socket)
	refused(t, "CHECK", n.check(t, stays), types.ErrTryAgainLater, "no agent is running")
	n.start(t)
	if got := n.sandboxes(); got != "default/shop-1=stays" {
		t.Errorf("the next agent has %s", got)
	}
}

func TestCNIWaitsForAPodThatIsNotKnownYet(t *testing.T) {
	n := newCNINode(t)
	var tries atomic.Int32
	n.source.asked = func(id string) {
		if tries.Add(1) == 3 {
			n.source.set(id, "uid-9", identity.Labels{"app": "late"})
		}
	}
	n.start(t)
	n.add(t, sandbox(t, "one", "default/late", "uid-9"))
	if tries.Load() < 3 {
		t.Errorf("it was there after %d tries", tries.Load())
	}
	t.Setenv(pluginPatience, "300ms")
	_, err := n.tryAdd(t, sandbox(t, "two", "default/late", "uid-10"))
	refused(t, "a pod of another UID", err, types.ErrTryAgainLater, "labels of pod default/late are not known yet: the API server has told of no such pod")
}

// TestCNIAddsOnceTheAgentRuns starts the agent when the plugin has found none.
func TestCNIAddsOnceTheAgentRuns(t *testing.T) {
	n := newCNINode(t)
	n.conf = fmt.Sprintf(`,"logFile":%q`, filepath.Join(t.TempDir(), "log"))
	began := make(chan struct{})
	added := make(chan error, 1)
	go func() {
		close(began)
		_, err := n.tryAdd(t, sandbox(t, "one", "default/shop-1", "uid-1"))
		added <- err
	}()
	<-began
	waitLog(t, n, "will be tried again", "no agent is running")
	n.start(t)
	if err := <-added; err != nil {
		t.Error(err)
	}
	waitLog(t, n, "command=ADD container=one", "msg=done")
}

// waitLog waits until the plugin's log has all of the texts.
func waitLog(t *testing.T, n *cniNode, texts ...string) {
	t.Helper()
	var conf struct {
		Plugins []struct{ LogFile string }
	}
	if err := json.Unmarshal(n.network(t).Bytes, &conf); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(patience)
	for {
		data, _ := os.ReadFile(conf.Plugins[0].LogFile)
		missing := slices.ContainsFunc(texts, func(s string) bool { return !strings.Contains(string(data), s) })
		if !missing {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the log has no %q: %s", texts, data)
		}
		time.Sleep(5 * time.Millisecond) // another process writes it
	}
}

func TestCNIRefusesWithAReason(t *testing.T) {
	n := newCNINode(t)
	n.start(t)
	if _, err := n.pods.Add(t.Context(), api.EndpointRequest{Name: "by-hand", NetNS: "/proc/self/ns/net"}); err != nil {
		t.Fatal(err)
	}
	n.source.set("default/by-hand", "", identity.Labels{"app": "a"})
	before := n.sandboxes()
	for _, test := range []struct {
		what, conf string
		change     func(*libcni.RuntimeConf)
		code       uint
		text       string
	}{
		{"an unknown key", `,"sokket":"/x"`, nil, types.ErrInvalidNetworkConfig, `unknown key "sokket"`},
		{"a relative socket", `,"logFile":"log"`, nil, types.ErrInvalidNetworkConfig, `logFile "log": want an absolute path`},
		{"another plugin's addresses", `,"ipam":{"type":"host-local"}`, nil, types.ErrInvalidNetworkConfig, `ipam "host-local": addresses are the agent's to give`},
		{"host ports", `,"capabilities":{"portMappings":true}`, nil, types.ErrInvalidNetworkConfig, `capability "portMappings"`},
		{"a chain", `,"prevResult":{"cniVersion":"1.1.0","ips":[{"address":"192.0.2.7/24"}]}`, nil, types.ErrInvalidNetworkConfig, "put it first in the list of plugins"},
		{"no pod", "", func(s *libcni.RuntimeConf) { s.Args = nil }, types.ErrInvalidEnvironmentVariables, "K8S_POD_NAMESPACE and K8S_POD_NAME are missing"},
		{"an unknown argument", "", func(s *libcni.RuntimeConf) { s.Args = append(s.Args[1:], [2]string{"COLOUR", "red"}) }, types.ErrInvalidEnvironmentVariables, "COLOUR"},
		{"a name that is no pod's", "", func(s *libcni.RuntimeConf) { s.Args[2][1] = "Shop_1" }, types.ErrInvalidEnvironmentVariables, "is not a DNS subdomain"},
		{"an interface that is there", "", func(s *libcni.RuntimeConf) { s.IfName = "lo" }, types.ErrInvalidEnvironmentVariables, `interface name "lo"`},
		{"a pod that was added by hand", "", func(s *libcni.RuntimeConf) { s.Args[2][1], s.Args[4][1] = "by-hand", "" }, types.ErrInternal, "is no pod of Kubernetes"},
	} {
		n.conf = test.conf
		s := sandbox(t, "one", "default/shop-1", "uid-1")
		if test.change != nil {
			test.change(s)
		}
		_, err := n.tryAdd(t, s)
		refused(t, test.what, err, test.code, test.text)
	}
	if got := n.sandboxes(); got != before || len(n.links.(fileLinks).names()) != 1 {
		t.Errorf("afterwards the agent has %s, before it had %s", got, before)
	}
	// What the specification and runtimes have is no reason.
	n.conf = `,"args":{"cni":{}},"dns":{"nameservers":["192.0.2.53"]},"ipMasq":false,"capabilities":{"portMappings":false},"cni.dev/x":1,"ipam":{}`
	if got := n.add(t, sandbox(t, "one", "default/shop-1", "uid-1")); len(got.DNS.Nameservers) != 1 {
		t.Errorf("the network's DNS is not in the result: %+v", got.DNS)
	}
}

// TestAPodsLabelsChangeWhileItRuns: its identity follows, as soon as there is one, and it is never without.
func TestAPodsLabelsChangeWhileItRuns(t *testing.T) {
	n := newCNINode(t)
	n.start(t)
	n.add(t, sandbox(t, "one", "default/shop-1", "uid-1"))
	before, _ := n.pods.get("default/shop-1")
	txn := n.tables.DB.WriteTxn(n.tables.Endpoints)
	changes, err := n.tables.Endpoints.Changes(txn)
	if err != nil {
		t.Fatal(err)
	}
	txn.Commit()
	is := func(what, labels string, and func(identity.Endpoint) bool) {
		t.Helper()
		until(t, n.tables, n.tables.Endpoints, what, func(txn statedb.ReadTxn) bool {
			row, _, ok := n.tables.Endpoints.Get(txn, n.tables.Endpoints.ByKey("default/shop-1"))
			if !ok {
				t.Fatal("the pod was without an endpoint")
			}
			return row.Object.Labels.String() == labels && and(row.Object)
		})
	}
	n.pods.Relabel("default", "shop-1", identity.Labels{"app": "shop", "version": "2"})
	is("it has the identity of its new labels", "app=shop,io.kubernetes.pod.namespace=default,version=2", func(ep identity.Endpoint) bool {
		return ep.Identity != before.Identity && ep.Address == before.Address && ep.HostLink == before.HostLink
	})
	seq, _ := changes.Next(n.tables.DB.ReadTxn())
	for change := range seq {
		if change.Deleted {
			t.Error("the endpoint was deleted")
		}
	}
	waitUsed(t, n.store, 1)

	// The store is away: it keeps what it has, says so, and gets the new one when the store is back.
	identityPatience(t, 20*time.Millisecond)
	pause := relabelPause
	relabelPause = 20 * time.Millisecond
	t.Cleanup(func() { relabelPause = pause })
	n.restart(t)
	n.store.Disconnect()
	n.pods.Relabel("default", "shop-1", identity.Labels{"app": "other"})
	deadline := time.Now().Add(patience)
	for len(n.pods.problems()) == 0 {
		if time.Now().After(deadline) {
			t.Fatal("status does not say that the pod has the identity of its former labels")
		}
		time.Sleep(time.Millisecond) // nothing tells of it
	}
	if p := n.pods.problems()[0]; !strings.Contains(p, "endpoint default/shop-1 keeps the identity of its former labels for now") {
		t.Errorf("the problem is %q", p)
	}
	n.store.Reconnect()
	is("it has the identity of its new labels", "app=other,io.kubernetes.pod.namespace=default", func(identity.Endpoint) bool { return true })
	if p := n.pods.problems(); len(p) != 0 {
		t.Errorf("problems remain: %q", p)
	}
	// Others are left alone, and what is as it was changes nothing.
	n.pods.Relabel("default", "nobody", identity.Labels{"app": "x"})
	n.pods.Relabel("default", "shop-1", identity.Labels{"app": "x"})
	n.pods.Relabel("default", "shop-1", identity.Labels{"app": "other"})
	n.pods.mu.Lock()
	defer n.pods.mu.Unlock()
	if len(n.pods.relabelled) != 0 {
		t.Errorf("to be relabelled are %v", n.pods.relabelled)
	}
}

// waitUsed waits until so many identities are in use.
func waitUsed(t *testing.T, store *kvstore.Memory, want int) {
	t.Helper()
	for deadline := time.Now().Add(patience); used(t, store) != want; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d identities are in use, want %d", used(t, store), want)
		}
	}
}

// TestLabelsThatChangeWhileAPodIsAdded: the source tells of a change when there is no endpoint yet that it could be of.
func TestLabelsThatChangeWhileAPodIsAdded(t *testing.T) {
	n := newCNINode(t)
	var asked atomic.Int32
	n.source.asked = func(id string) {
		if asked.Add(1) == 2 {
			n.source.set(id, "uid-1", identity.Labels{"app": "changed"})
		}
	}
	n.start(t)
	n.add(t, sandbox(t, "one", "default/shop-1", "uid-1"))
	until(t, n.tables, n.tables.Endpoints, "it has the labels that the pod has now", func(txn statedb.ReadTxn) bool {
		row, _, ok := n.tables.Endpoints.Get(txn, n.tables.Endpoints.ByKey("default/shop-1"))
		return ok && row.Object.Labels["app"] == "changed"
	})
}
