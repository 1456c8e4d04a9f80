package testbed

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"causeway/identity"
)

func TestBedIDs(t *testing.T) {
	for dir, want := range map[string]string{"": "cw", DefaultDir: "cw", DefaultDir + "/../testbed/": "cw", DemoDir: "cwdemo"} {
		if l, err := newLayout(dir); err != nil || l.id != want {
			t.Errorf("%q: ID %s, want %s (%v)", dir, l.id, want, err)
		}
	}
	a, _ := newLayout("/tmp/a")
	b, _ := newLayout("/tmp/b")
	if a.id == b.id || len(a.id) != 8 {
		t.Errorf("IDs %s and %s", a.id, b.id)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/tmp", link); err != nil {
		t.Fatal(err)
	}
	if c, _ := newLayout(link + "/a"); c.id != a.id {
		t.Errorf("through a symbolic link: %s, want %s", c.id, a.id)
	}
}

// A bed takes no namespace for its own that another bed, or somebody else, has made.
func TestOwnsNS(t *testing.T) {
	l, _ := newLayout(DefaultDir)
	for name, want := range map[string]bool{
		l.underlayNS(): true, l.kvstoreNS("east"): true, l.nodeNS("east", "node12"): true, l.podNS("east", "my-pod"): true,
		l.nodeNS("demo-east", "node1"): true,
		"cw-mine":                      false, "cw-east-nodex": false, "cwdemo-underlay": false, "cw2f3e4a-east-node1": false, "cw": false, "other": false,
	} {
		if got := l.ownsNS(name); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestAddresses(t *testing.T) {
	for want, got := range map[string]any{
		"172.29.2.2":                            UnderlayIPv4.kvstoreAddress(2),
		"172.29.255.210":                        UnderlayIPv4.nodeAddress(255, 200),
		"fd00:172:29:2::2":                      UnderlayIPv6.kvstoreAddress(2),
		"fd00:172:29:255::210":                  UnderlayIPv6.nodeAddress(255, 200),
		"[10.7.0.0/16 fd00:10:7::/48]":          clusterPodCIDRs(7),
		"[10.7.200.0/24 fd00:10:7:200::/64]":    nodePodCIDRs(7, 200),
		"[100.64.64.0/18 fd00:100:1::/112]":     clusterServiceCIDRs(1),
		"[100.65.0.0/18 fd00:100:4::/112]":      clusterServiceCIDRs(4),
		"[100.127.192.0/18 fd00:100:255::/112]": clusterServiceCIDRs(255),
	} {
		if fmt.Sprint(got) != want {
			t.Errorf("got %v, want %s", got, want)
		}
	}
	for _, c := range []identity.ClusterID{1, 9, 10, 99, 100, 255} {
		for _, p := range append(append(clusterPodCIDRs(c), nodePodCIDRs(c, int(c)%MaxNodes)...), clusterServiceCIDRs(c)...) {
			if p != p.Masked() {
				t.Errorf("%v is no range", p)
			}
		}
	}
}

// Each device of the machine has a name of its own, which the kernel takes, and which leads back to its bed.
func TestWireGuardNames(t *testing.T) {
	seen := map[string]bool{}
	for _, dir := range []string{DefaultDir, DemoDir, "/tmp/a"} {
		l, _ := newLayout(dir)
		for c := 1; c <= MaxClusters; c++ {
			for _, n := range []int{1, 9, 10, MaxNodes} {
				name := l.wireGuardName(identity.ClusterID(c), n)
				if len(name) > 14 || seen[name] || !wireGuardSocket.MatchString(strings.TrimPrefix(name, l.id+"-")+"0.sock") {
					t.Fatalf("device %q is too long, there already, or not known as the bed's", name)
				}
				seen[name] = true
			}
		}
	}
}

func TestPortNames(t *testing.T) {
	seen := map[string]bool{}
	for c := range 20 {
		for n := 1; n <= MaxNodes; n++ {
			p := portName(fmt.Sprintf("production-in-europe-%d", c), nodeName(n))
			if len(p) > 15 || seen[p] {
				t.Fatalf("port %q is too long or there already", p)
			}
			seen[p] = true
		}
	}
	if p := portName("east", "node1"); p != "east-node1" {
		t.Errorf("port %q", p)
	}
}

func TestValidateOptions(t *testing.T) {
	many := make([]string, 255)
	for i := range many {
		many[i] = fmt.Sprintf("c%d", i)
	}
	for _, c := range []struct {
		clusters []string
		nodes    int
		dir      string
		want     string // empty: fine
	}{
		{[]string{"east", "west"}, 2, "/run/x", ""},
		{[]string{"a-rather-long-name", "b"}, 200, "/run/x", ""},
		{many, 3, "/run/x", ""},
		{many, 4, "/run/x", "1275 ports"},
		{nil, 2, "/run/x", "1 to 255"},
		{[]string{"east"}, 0, "/run/x", "1 to 200"},
		{[]string{"east"}, 201, "/run/x", "1 to 200"},
		{[]string{"east", "east"}, 1, "/run/x", "twice"},
		{[]string{"East"}, 1, "/run/x", "lower case"},
		{[]string{""}, 1, "/run/x", "empty"},
		{[]string{strings.Repeat("x", 33)}, 1, "/run/x", "33 characters"},
		{[]string{"underlay"}, 1, "/run/x", "reserved"},
		{[]string{"a-pod"}, 1, "/run/x", "reserved"},
		{[]string{"east"}, 1, "/run/" + strings.Repeat("x", 90), "shorter --dir"},
		{[]string{"east"}, 1, "/run/a b", "white space"},
	} {
		l, err := newLayout(c.dir)
		if err != nil {
			t.Fatal(err)
		}
		err = (&Options{Clusters: c.clusters, Nodes: c.nodes}).validate(l)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.40q × %d in %.20s: %v, want %q", c.clusters, c.nodes, c.dir, err, c.want)
		}
	}
}

func TestValidateFamilyAndEncryption(t *testing.T) {
	l, _ := newLayout("/run/x")
	west := func(mode identity.Encryption) map[string]identity.Encryption {
		return map[string]identity.Encryption{"west": mode}
	}
	for _, c := range []struct {
		o    Options
		want string // empty: fine
	}{
		{Options{}, ""},
		{Options{Underlay: UnderlayIPv6, Encryption: "inter-cluster"}, ""},
		{Options{Encryption: "off"}, ""},
		{Options{EncryptionOf: west("inter-cluster")}, ""},
		{Options{EncryptionOf: west("off"), Unconnected: true}, ""},
		{Options{EncryptionOf: west("off")}, "refuse to be joined"},
		{Options{Encryption: "off", EncryptionOf: west("all")}, "refuse to be joined"},
		{Options{Encryption: "some"}, "is not one of"},
		{Options{EncryptionOf: west("some")}, "is not one of"},
		{Options{EncryptionOf: map[string]identity.Encryption{"north": "off"}}, "east, west"},
		{Options{Underlay: "ipx"}, "neither ipv4 nor ipv6"},
	} {
		o := c.o
		o.Clusters, o.Nodes = []string{"east", "west"}, 1
		if err := o.validate(l); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.o, err, c.want)
		}
	}
}

func TestParseTarget(t *testing.T) {
	for in, want := range map[string]Target{
		"underlay": {}, "east/node1": {Cluster: "east", Node: "node1"}, "east/pod:web": {Cluster: "east", Pod: "web"}, "east/kvstore": {Cluster: "east"},
	} {
		got, err := ParseTarget(in)
		if err != nil || got != want || got.String() != in {
			t.Errorf("%q: %+v %v", in, got, err)
		}
	}
	for _, in := range []string{"", "east", "/", "east/", "/node1", "a/b/c"} {
		if got, err := ParseTarget(in); err == nil {
			t.Errorf("%q is accepted as %+v", in, got)
		}
	}
}

func TestParseVictim(t *testing.T) {
	for in, want := range map[[2]string]Victim{
		{"agent", "east/node1"}: {"agent", "east", "node1"}, {"node", "east/node1"}: {"node", "east", "node1"}, {"kvstore", "east"}: {"kvstore", "east", ""},
		{"cluster", "east"}: {"cluster", "east", ""}, {"wireguard", "east/node1"}: {"wireguard", "east", "node1"},
	} {
		if got, err := ParseVictim(in[0], in[1]); err != nil || got != want {
			t.Errorf("%v: %+v, %v", in, got, err)
		}
	}
	for _, in := range [][2]string{{"agent", "east"}, {"kvstore", "east/node1"}, {"cluster", "east/node1"}, {"pod", "east/web"}} {
		if _, err := ParseVictim(in[0], in[1]); err == nil {
			t.Errorf("%v is accepted", in)
		}
	}
}

func TestParseLabels(t *testing.T) {
	got, err := ParseLabels("app=shop,tier=,x=a=b")
	if want := map[string]string{"app": "shop", "tier": "", "x": "a=b"}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for _, in := range []string{"app", "=x", "a=b c", "a=1,a=2"} {
		if got, err := ParseLabels(in); err == nil {
			t.Errorf("%q is accepted as %v", in, got)
		}
	}
}

func TestListensIn(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:0050 0100007F:1F91 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0 20 4 30 10 -1
   2: 00000000000000000000000000000000:0051 00000000000000000000000000000000:0000 0A 0 0 0 0 0 0
`
	for port, want := range map[uint16]bool{8080: true, 80: false, 8081: false, 81: true} {
		if listensIn(table, port) != want {
			t.Errorf("port %d: not %v", port, want)
		}
	}
}

func TestParseMounts(t *testing.T) {
	got := parseMounts(`24 1 0:22 / /sys rw,relatime shared:7 - sysfs sysfs rw
41 31 0:38 / /mnt/with\040blank rw - cgroup2 cgroup2 rw
nonsense
`)
	if want := []mount{{"/sys", "sysfs"}, {"/mnt/with blank", "cgroup2"}}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v", got)
	}
}

func TestProcessIsItselfOnly(t *testing.T) {
	self, err := processOf(os.Getpid())
	if err != nil || !self.alive() {
		t.Fatalf("%+v, %v", self, err)
	}
	if other := (&Process{PID: self.PID, Start: self.Start - 1}); other.alive() {
		t.Error("another process with this one's number is taken for it")
	}
	if (*Process)(nil).alive() || (&Process{PID: 1 << 30}).alive() {
		t.Error("no process is alive")
	}
}
