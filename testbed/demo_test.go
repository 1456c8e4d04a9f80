package testbed

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"causeway/datapath"
)

func TestDemoRunCheck(t *testing.T) {
	both, westOnly := map[string]int{"east": 2, "west": 2}, map[string]int{"west": 2}
	for _, tc := range []struct {
		name    string
		failed  int
		by      map[string]int
		servers map[string]int
		want    string // part of the error; empty: none
	}{
		{"both answer", 0, map[string]int{"east": 4, "west": 6}, both, ""},
		{"one is silent", 0, map[string]int{"east": 0, "west": 10}, both, "0 answers from east, which has 2 servers"},
		{"the other serves", 0, map[string]int{"east": 0, "west": 10}, westOnly, ""},
		{"a deleted one answers", 0, map[string]int{"east": 1, "west": 9}, westOnly, "1 answers from east, which has 0 servers"},
		{"some fail", 3, map[string]int{"east": 4, "west": 3}, both, "3 of 10 requests of east's client failed: timeout 3"},
	} {
		run := demoRun{DemoTraffic: DemoTraffic{Client: "east", Requests: 10, Failed: tc.failed, By: tc.by}, errors: map[string]int{"timeout": tc.failed}}
		err := run.check(tc.servers)
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: got %v, want %q", tc.name, err, tc.want)
		}
	}
}

func TestPercentile(t *testing.T) {
	var samples []time.Duration
	for i := 200; i >= 1; i-- {
		samples = append(samples, time.Duration(i)*time.Millisecond)
	}
	for p, want := range map[int]float64{50: 100, 99: 198, 100: 200} {
		if got := percentile(samples, p); got != want {
			t.Errorf("p%d of 1…200 ms: got %v, want %v", p, got, want)
		}
	}
	if got := percentile([]time.Duration{1234567 * time.Nanosecond}, 99); got != 1.2 {
		t.Errorf("got %v, want 1.2", got)
	}
	if got := percentile(nil, 50); got != 0 {
		t.Errorf("of nothing: got %v", got)
	}
}

// TestCountServers has one backend in several slots, as it may be seen while the kernel is being written.
func TestCountServers(t *testing.T) {
	at := func(addr string) netip.AddrPort { return netip.MustParseAddrPort(addr) }
	got := countServers([]datapath.BackendEntry{
		{Address: at("10.1.1.2:8080"), Owner: 1}, {Address: at("10.2.1.2:8080"), Owner: 2},
		{Address: at("10.2.2.2:8080"), Owner: 2}, {Address: at("10.2.2.2:8080"), Owner: 2},
	})
	if answers(got) != "east 1, west 2" {
		t.Errorf("got %v", got)
	}
}

func TestComplaintsAreTheLastWarningsAndErrors(t *testing.T) {
	log := filepath.Join(t.TempDir(), "agent.log")
	lines := []string{"level=WARN msg=1", "level=INFO msg=2", "level=ERROR msg=3", "level=WARN msg=4", "level=DEBUG msg=5", "level=WARN msg=6"}
	if err := os.WriteFile(log, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, want := complaints(log), []string{lines[2], lines[3], lines[5]}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := complaints(log + ".missing"); len(got) != 0 {
		t.Errorf("of a missing log: got %q", got)
	}
}
