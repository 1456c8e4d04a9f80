package testbed

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMTUs(t *testing.T) {
	l, _ := newLayout("/run/x")
	s, err := newState(l, &Options{Clusters: []string{"east", "west"}, Nodes: 1})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		in   []PathMTU
		want string
	}{
		{"nodes", []PathMTU{{A: "east/node1", B: "west/node1", Size: 1400}}, "172.29.1.11>172.29.2.11:1400 172.29.2.11>172.29.1.11:1400"},
		{"one way", []PathMTU{{A: "east/node1", B: "west", Size: 1400, OneWay: true}}, "172.29.1.11>172.29.2.11:1400 172.29.1.11>172.29.2.2:1400"},
		{"the smallest counts", []PathMTU{{A: "east/node1", B: "west/node1", Size: 1300, OneWay: true}, {A: "west/node1", B: "east/node1", Size: 1400}},
			"172.29.1.11>172.29.2.11:1300 172.29.2.11>172.29.1.11:1400"},
		{"none", nil, ""},
	} {
		mtus, err := s.mtus(c.in)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for path, mtu := range mtus {
			got = append(got, fmt.Sprintf("%v>%v:%d", path.From, path.To, mtu))
		}
		slices.Sort(got)
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: got  %s\nwant %s", c.name, strings.Join(got, " "), c.want)
		}
	}
}

// passes tells whether an IP packet of so many bytes gets from a node to an address: nobody listens there, and a small packet says so.
func passes(t *testing.T, b *Bed, from, to string, size int) bool {
	t.Helper()
	node, err := ParseNode(from)
	if err != nil {
		t.Fatal(err)
	}
	var conn net.Conn
	if err := inNS(b.nodeNS(node.Cluster, node.Node), func() (err error) {
		conn, err = net.Dial("udp", net.JoinHostPort(to, "9"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	headers := 20 + 8
	if strings.Contains(to, ":") {
		headers = 40 + 8
	}
	if _, err := conn.Write(make([]byte, size-headers)); err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(500 * time.Millisecond))
	_, err = conn.Read(make([]byte, 1))
	if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("from %s to %s: %v", from, to, err)
	}
	return errors.Is(err, unix.ECONNREFUSED)
}

func TestSetMTU(t *testing.T) {
	b := mustUp(t, Options{})
	wantPass := func(from, to string, size int, want bool) {
		t.Helper()
		if got := passes(t, b, from, to, size); got != want {
			t.Errorf("%d bytes from %s to %s pass: %v, want %v", size, from, to, got, want)
		}
	}
	if err := b.SetMTU(t.Context(), "east", "west", 1400); err != nil {
		t.Fatal(err)
	}
	wantPass("east/node1", "172.29.2.11", 1400, true)
	wantPass("east/node1", "172.29.2.11", 1401, false)
	wantPass("west/node2", "172.29.1.2", 1401, false)
	wantPass("east/node1", "172.29.1.12", 1500, true)
	st, err := b.Status(t.Context())
	if err != nil || len(st.PathMTUs) != 1 || st.PathMTUs[0].Lost != 2 || len(st.Partitions) != 0 || st.PathMTUs[0].String() != "east <-> west loses packets over 1400 bytes" {
		t.Errorf("status shows %+v, %+v, %v", st.PathMTUs, st.Partitions, err)
	}
	// It is replaced, and stands beside a partition.
	if err := b.SetMTU(t.Context(), "west", "east", 1300); err != nil {
		t.Fatal(err)
	}
	if err := b.Partition(t.Context(), Partition{A: "east/node2", B: "west", Loss: 100}); err != nil {
		t.Fatal(err)
	}
	wantPass("east/node1", "172.29.2.11", 1301, false)
	wantPass("east/node2", "172.29.2.11", 100, false)
	if err := b.Heal(t.Context(), "east", "west/node1"); err == nil || !strings.Contains(err.Error(), "west <-> east loses packets over 1300 bytes") {
		t.Errorf("healing something else: %v", err)
	}
	if err := b.Heal(t.Context(), "east", "west"); err != nil {
		t.Error(err)
	}
	wantPass("east/node1", "172.29.2.11", 1500, true)
	wantPass("east/node2", "172.29.2.11", 100, false)
	if err := b.SetPathMTU(t.Context(), PathMTU{A: "east", B: "west", Size: 1000, OneWay: true}); err != nil {
		t.Fatal(err)
	}
	wantPass("east/node1", "172.29.2.11", 1001, false)
	wantPass("west/node1", "172.29.1.11", 1500, true)
	if err := b.HealAll(t.Context()); err != nil {
		t.Error(err)
	}
	wantPass("east/node1", "172.29.2.11", 1500, true)
	for _, p := range []PathMTU{{A: "east", B: "east", Size: 1400}, {A: "east", B: "nowhere", Size: 1400}, {A: "east", B: "west"}, {A: "east", B: "west", Size: 67}, {A: "east", B: "west", Size: 1 << 16}} {
		if err := b.SetPathMTU(t.Context(), p); err == nil {
			t.Errorf("%v was accepted", p)
		}
	}
	if s, err := b.State(); err != nil || len(s.PathMTUs) != 0 {
		t.Errorf("recorded is %+v, %v", s.PathMTUs, err)
	}
}
