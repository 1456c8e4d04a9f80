package tunnel

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"causeway/identity"
)

// crowd returns rows of n nodes that nobody answers for.
func crowd(n int) []identity.Tunnel {
	rows := make([]identity.Tunnel, n)
	for i := range rows {
		rows[i] = crowded(i)
	}
	return rows
}

func crowded(i int) identity.Tunnel {
	high, low := byte(1+i/250), byte(i%250)
	var key identity.WireGuardKey
	copy(key[:], fmt.Sprintf("key %d", i))
	return identity.Tunnel{
		Cluster: "west", ClusterID: 2, Node: fmt.Sprint("node", i), Mode: identity.TunnelWireGuard, MTU: 1390,
		Address:  netip.AddrFrom4([4]byte{192, 0, high, low}),
		PodCIDRs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 100 + high, low, 0}), 24)},
		Keys:     []identity.TunnelKey{{Key: key, Port: DefaultWireGuardPort}},
	}
}

// counted is a control that counts.
type counted struct {
	control
	reads, changes, peers int
}

func (c *counted) Device(name string) (*wgtypes.Device, error) {
	c.reads++
	return c.control.Device(name)
}

func (c *counted) ConfigureDevice(name string, cfg wgtypes.Config) error {
	c.changes++
	c.peers += len(cfg.Peers)
	return c.control.ConfigureDevice(name, cfg)
}

// TestOneChangeCostsOneCall: what one node's change costs does not depend on how many nodes there are.
func TestOneChangeCostsOneCall(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		m := machines(t, kind, 1, families{})[0]
		var err error
		m.in(func() { m.wg, err = OpenWireGuard(t.Context(), m.cfg) }) // Nothing runs, so whatever is called is the change's.
		if err != nil {
			t.Fatal(err)
		}
		m.stop = func() { must(t, m.wg.Close()) }
		rows := crowd(300)
		for _, row := range rows[1:] {
			must(t, m.wg.Update(t.Context(), row))
		}
		moved := rows[7]
		moved.Address = netip.MustParseAddr("192.0.200.1")
		count := &counted{control: m.wg.slots[0].control}
		m.wg.slots[0].control = count
		for _, c := range []struct {
			what    string
			change  func() error
			changes int
		}{
			{"a node more", func() error { return m.wg.Update(t.Context(), rows[0]) }, 1},
			{"the same again", func() error { return m.wg.Update(t.Context(), rows[0]) }, 0},
			{"a node that moves", func() error { return m.wg.Update(t.Context(), moved) }, 1},
			{"a node less", func() error { return m.wg.Delete(t.Context(), rows[8]) }, 1},
		} {
			count.reads, count.changes, count.peers = 0, 0, 0
			must(t, c.change())
			if count.reads != 0 || count.changes != c.changes || count.peers > 3 {
				t.Errorf("%s costs %d reads and %d changes of %d peers; want no reads, %d changes", c.what, count.reads, count.changes, count.peers, c.changes)
			}
		}
	})
}

// TestLooksAreBounded: looking at many peers takes a twentieth of the time at most, however long one look takes.
func TestLooksAreBounded(t *testing.T) {
	now := time.Now()
	s := &slot{pace: pace{wait: quickLook, last: now, cost: time.Second}, checked: now, checkCost: time.Second}
	s.sessions = map[identity.WireGuardKey]*session{{1}: {asked: 1, due: now.Add(time.Second)}}
	if wait := s.next(now).Sub(now); wait < 19*time.Second {
		t.Errorf("a device whose look takes a second is looked at again after %s", wait)
	}
	s.suspect = true
	if wait := s.checkDue().Sub(now); wait < 19*time.Second {
		t.Errorf("it is compared again after %s", wait)
	}
	if cost := costOf(time.Second, 10_000); cost != time.Second {
		t.Errorf("a look at 10,000 peers that takes a second costs %s", cost)
	}
	if cost := costOf(time.Second, 1); lookShare*cost > 100*time.Millisecond {
		t.Errorf("a look at one peer that waits for a second costs %s", cost)
	}
	s = &slot{pace: pace{wait: quickLook, last: now, cost: time.Millisecond}, checked: now, sessions: s.sessions}
	if wait := s.next(now).Sub(now); wait > 2*quickLook {
		t.Errorf("a device whose look takes a millisecond is looked at again after %s", wait)
	}
}

// BenchmarkPeers is what 10,000 nodes cost, none of which answers: the worst case, since all of them are asked again and again.
func BenchmarkPeers(b *testing.B) {
	const n = 10_000
	for _, kind := range kinds(b) {
		b.Run(kind, func(b *testing.B) {
			for b.Loop() {
				benchPeers(b, kind, n)
			}
		})
	}
}

func benchPeers(b *testing.B, kind string, n int) {
	m := machines(b, kind, 1, families{})[0]
	m.cfg.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	rows := crowd(n)
	before := m.memory(0)
	m.open()
	pid := m.process()
	emptyProcess := m.memory(pid)

	start := time.Now()
	for _, row := range rows {
		if err := m.wg.Update(b.Context(), row); err != nil {
			b.Fatalf("node %s: %v", row.Node, err)
		}
	}
	perPeer := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(n) }
	b.ReportMetric(perPeer(time.Since(start)), "µs/added")
	b.ReportMetric(float64(m.memory(0)-before)/float64(n), "B/peer")
	if pid != 0 {
		b.ReportMetric(float64(m.memory(pid)-emptyProcess)/float64(n), "process-B/peer")
	}

	moved := rows[n/2]
	const changes = 20
	start = time.Now()
	for i := range changes {
		moved.Address = netip.AddrFrom4([4]byte{192, 0, 200, byte(i)})
		must(b, m.wg.Update(b.Context(), moved))
	}
	b.ReportMetric(float64(time.Since(start).Microseconds())/changes, "µs/changed")
	rows[n/2] = moved

	m.close()
	start = time.Now()
	m.open()
	must(b, m.wg.Prune(context.Background(), slices.Values(rows), func(identity.ClusterID) bool { return true }))
	b.ReportMetric(float64(time.Since(start).Milliseconds()), "ms/restart")

	// What goes on for ever.
	const window = 10 * time.Second
	used, usedThere, start := cpu(b), cpuOf(b, pid), time.Now()
	<-time.After(window)
	took := time.Since(start)
	b.ReportMetric(100*float64(cpu(b)-used)/float64(took), "cpu-%")
	if pid != 0 {
		b.ReportMetric(100*float64(cpuOf(b, pid)-usedThere)/float64(took), "process-cpu-%")
	}
	m.wg.mu.Lock()
	s := m.wg.slots[0]
	b.ReportMetric(float64(s.pace.cost.Microseconds())/1000, "ms/look")
	b.ReportMetric(float64(s.checkCost.Microseconds())/1000, "ms/check")
	m.wg.mu.Unlock()
	m.close()
}

// process returns the machine's process in user space, 0 if it has none.
func (m *machine) process() int {
	m.wg.mu.Lock()
	defer m.wg.mu.Unlock()
	return m.wg.slots[0].process.pid
}

// memory returns the bytes that a process has in memory; of this one, those that are in use.
func (m *machine) memory(pid int) int64 {
	m.t.Helper()
	if pid == 0 {
		runtime.GC()
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		return int64(stats.HeapAlloc)
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	must(m.t, err)
	fields := bytes.Fields(data)
	if len(fields) < 2 {
		m.t.Fatalf("statm of process %d is %q", pid, data)
	}
	pages, err := strconv.ParseInt(string(fields[1]), 10, 64)
	must(m.t, err)
	return pages * int64(os.Getpagesize())
}

// cpu returns the processor time that this process has used.
func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// cpuOf returns that of another process, in the kernel's ticks of 10 ms (proc(5)).
func cpuOf(b *testing.B, pid int) time.Duration {
	b.Helper()
	if pid == 0 {
		return 0
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(b, err)
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 13 {
		b.Fatalf("stat of process %d is %q", pid, data)
	}
	user, err := strconv.Atoi(fields[11])
	must(b, err)
	system, err := strconv.Atoi(fields[12])
	must(b, err)
	return time.Duration(user+system) * 10 * time.Millisecond
}
