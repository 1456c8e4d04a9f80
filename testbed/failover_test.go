package testbed

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"causeway/identity"
)

func TestFailoverOptions(t *testing.T) {
	good := FailoverOptions{Clusters: 2, Nodes: 2, Kills: 1, Rate: 1}
	if err := good.validate(); err != nil {
		t.Error(err)
	}
	for _, bad := range []func(*FailoverOptions){
		func(o *FailoverOptions) { o.Clusters = 1 }, func(o *FailoverOptions) { o.Nodes = 1 },
		func(o *FailoverOptions) { o.Kills = 0 }, func(o *FailoverOptions) { o.ClusterKills = -1 }, func(o *FailoverOptions) { o.Rate = 0 },
	} {
		o := good
		if bad(&o); o.validate() == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
}

func TestVictimHits(t *testing.T) {
	node := identity.NodeName{Cluster: "west", Node: "node2"}
	for v, want := range map[Victim]bool{
		{Kind: "cluster", Cluster: "west"}: true, {Kind: "cluster", Cluster: "east"}: false,
		{Kind: "node", Cluster: "west", Node: "node2"}: true, {Kind: "node", Cluster: "west", Node: "node1"}: false,
	} {
		if v.hits(node) != want {
			t.Errorf("%v: not %v", v, want)
		}
	}
}

// A failed request is the kill's if it was sent shortly before it or until the client's own kernel had nothing of the victim.
func TestStrayFailures(t *testing.T) {
	at := time.Now()
	var l LoadResult
	for _, sent := range []time.Duration{-time.Second, -100 * time.Millisecond, 0, 900 * time.Millisecond, 1100 * time.Millisecond} {
		l.Failed++
		l.Failures = append(l.Failures, LoadFailure{Sent: at.Add(sent), Error: "timeout"})
	}
	l.Requests, l.Errors = 100, map[string]int{"timeout": 5}
	for out, want := range map[time.Time]int{at.Add(time.Second): 2, {}: 1} {
		r := FailoverRound{At: at, Errors: map[string]int{}}
		if r.count(&l, out); r.Stray != want || r.Failed != 5 || r.Requests != 100 || r.Errors["timeout"] != 5 {
			t.Errorf("out at %v: %+v, want %d astray", out, r, want)
		}
	}
}

// rounds has node kills with the times at which they were out of one kernel, in milliseconds, and one cluster kill.
func failoverRounds(outs ...float64) *FailoverResult {
	r := new(FailoverResult)
	for _, ms := range outs {
		r.Rounds = append(r.Rounds, FailoverRound{
			Kind: "node", Victim: "c1/node2", Requests: 10, Failed: 2, Stray: 1,
			OutMS: map[string]float64{"c1/node1": ms, "c2/node1": ms / 2}, BackMS: map[string]float64{"c1/node1": 3},
		})
	}
	r.Rounds = append(r.Rounds, FailoverRound{Kind: "cluster", Victim: "c2", OutMS: map[string]float64{"c1/node1": 3000}, BackMS: map[string]float64{"c1/node1": 1500}, Late: []string{}})
	r.conclude()
	return r
}

func TestFailoverResult(t *testing.T) {
	r := failoverRounds(1000, 1200, 1400)
	if !r.OK || r.Node.Kills != 3 || r.Node.Out.Samples != 6 || r.Node.Out.Max != 1400 || r.Node.Out.P50 != 700 || r.Node.Requests != 30 || r.Node.Stray != 3 ||
		r.Cluster.Kills != 1 || r.Cluster.Back.P99 != 1500 {
		t.Errorf("%+v", r)
	}
	if slow := failoverRounds(1000, 2100); slow.OK || !strings.Contains(strings.Join(slow.Broken, " "), "p99 is 2100 ms, and at most 2000 ms") {
		t.Errorf("too slow: %v %q", slow.OK, slow.Broken)
	}
	r.Rounds[0].Late = []string{"c2/node2"}
	if r.conclude(); r.OK || !strings.Contains(r.Broken[0], "1 of 7 not within 15s") {
		t.Errorf("never out: %v %q", r.OK, r.Broken)
	}
	if none := new(FailoverResult); true {
		if none.conclude(); none.OK {
			t.Error("nothing measured is not as promised")
		}
	}

	var csv bytes.Buffer
	if err := r.WriteCSV(&csv); err != nil || !strings.HasPrefix(csv.String(), "kill,kind,victim,kernel,outMs,backMs\n1,node,c1/node2,c1/node1,1000.0,3.0\n1,node,c1/node2,c2/node1,500.0,\n1,node,c1/node2,c2/node2,,\n2,") {
		t.Errorf("%v\n%s", err, csv.String())
	}
	text, err := json.Marshal(r)
	if err != nil || !strings.Contains(string(text), `"p99":1400`) {
		t.Errorf("%s, %v", text, err)
	}
}

func TestHistogram(t *testing.T) {
	ms := func(list ...int) (d []time.Duration) {
		for _, v := range list {
			d = append(d, time.Duration(v)*time.Millisecond)
		}
		return d
	}
	got := distribution(ms(1010, 1050, 1099, 1350)).Histogram()
	want := "  1000 ms     3  " + strings.Repeat("#", 50) + "\n  1100 ms     0  \n  1200 ms     0  \n  1300 ms     1  " + strings.Repeat("#", 17) + "\n"
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if wide := distribution(ms(0, 100_000)).Histogram(); strings.Count(wide, "\n") > maxBins+1 {
		t.Errorf("%d lines", strings.Count(wide, "\n"))
	}
	if empty := distribution(nil).Histogram(); empty != "" {
		t.Errorf("of nothing: %q", empty)
	}
}
