package testbed

import (
	"encoding/csv"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// What is promised, at the 99th percentile.
const (
	nodeOutLimit     = 2 * time.Second
	clusterOutLimit  = 5 * time.Second
	clusterBackLimit = 2 * time.Second
)

// FailoverResult is all that was measured.
type FailoverResult struct {
	// OK is true if every promise was kept, and Broken says which were not.
	OK     bool     `json:"ok"`
	Broken []string `json:"broken"`
	// Node and Cluster sum up the kills of each kind.
	Node    FailoverSummary `json:"node"`
	Cluster FailoverSummary `json:"cluster"`
	Rounds  []FailoverRound `json:"rounds"`
}

// FailoverSummary sums up the kills of one kind.
type FailoverSummary struct {
	Kills int `json:"kills"`
	// Out and Back are of every kernel of every kill; Late counts those where it was not out at all.
	Out  Distribution `json:"outMs"`
	Late int          `json:"late"`
	Back Distribution `json:"backMs"`
	// Requests, see [FailoverRound].
	Requests int `json:"requests"`
	Failed   int `json:"failed"`
	Stray    int `json:"stray"`
}

// Distribution of durations, in milliseconds.
type Distribution struct {
	Samples int     `json:"samples"`
	P50     float64 `json:"p50"`
	P90     float64 `json:"p90"`
	P99     float64 `json:"p99"`
	Max     float64 `json:"max"`
	all     []time.Duration
}

// conclude sums up the rounds.
func (r *FailoverResult) conclude() {
	r.Node, r.Cluster = summary(r.Rounds, kindNode), summary(r.Rounds, kindCluster)
	r.Broken = []string{}
	check := func(what string, d Distribution, late int, limit time.Duration) {
		if late > 0 && late*100 > d.Samples+late { // more than the hundredth part
			r.Broken = append(r.Broken, fmt.Sprintf("%s: %d of %d not within %v", what, late, d.Samples+late, outTimeout))
		} else if d.P99 > milliseconds(limit) {
			r.Broken = append(r.Broken, fmt.Sprintf("%s: p99 is %.0f ms, and at most %.0f ms are promised", what, d.P99, milliseconds(limit)))
		}
	}
	check("a killed node out of a kernel", r.Node.Out, r.Node.Late, nodeOutLimit)
	check("a killed cluster out of a kernel", r.Cluster.Out, r.Cluster.Late, clusterOutLimit)
	check("a cluster back in a kernel", r.Cluster.Back, 0, clusterBackLimit)
	r.OK = len(r.Broken) == 0 && len(r.Rounds) > 0
}

func summary(rounds []FailoverRound, kind string) (s FailoverSummary) {
	var out, back []time.Duration
	for _, r := range rounds {
		if r.Kind != kind {
			continue
		}
		s.Kills++
		s.Late += len(r.Late)
		s.Requests, s.Failed, s.Stray = s.Requests+r.Requests, s.Failed+r.Failed, s.Stray+r.Stray
		out, back = append(out, durations(r.OutMS)...), append(back, durations(r.BackMS)...)
	}
	s.Out, s.Back = distribution(out), distribution(back)
	return s
}

func durations(ms map[string]float64) (list []time.Duration) {
	for _, v := range ms {
		list = append(list, time.Duration(v*float64(time.Millisecond)))
	}
	return list
}

func distribution(all []time.Duration) Distribution {
	return Distribution{
		Samples: len(all), P50: percentile(all, 50), P90: percentile(all, 90), P99: percentile(all, 99), Max: percentile(all, 100), all: all,
	}
}

const (
	// barWidth is the length of a histogram's longest bar, binSize the width of a bin.
	barWidth = 50
	binSize  = 100 * time.Millisecond
	maxBins  = 60
)

// Histogram draws a distribution, a line a bin; empty without samples.
func (d Distribution) Histogram() string {
	if len(d.all) == 0 {
		return ""
	}
	size := binSize
	first, last := slices.Min(d.all), slices.Max(d.all)
	for (last-first)/size >= maxBins {
		size *= 2
	}
	bins := make([]int, last/size-first/size+1)
	for _, v := range d.all {
		bins[v/size-first/size]++
	}
	var text strings.Builder
	for i, n := range bins {
		from := (first/size + time.Duration(i)) * size
		bar := strings.Repeat("#", (n*barWidth+slices.Max(bins)-1)/slices.Max(bins))
		fmt.Fprintf(&text, "%6d ms %5d  %s\n", from.Milliseconds(), n, bar)
	}
	return text.String()
}

// WriteCSV writes a line for each kernel of each kill: how long, in milliseconds, until the victim was out of it and back in it. What
// did not come is empty.
func (r *FailoverResult) WriteCSV(w io.Writer) error {
	out := csv.NewWriter(w)
	_ = out.Write([]string{"kill", "kind", "victim", "kernel", "outMs", "backMs"}) // Error tells
	for i, round := range r.Rounds {
		for _, node := range slices.Sorted(maps.Keys(round.OutMS)) {
			_ = out.Write([]string{strconv.Itoa(i + 1), round.Kind, round.Victim, node, cell(round.OutMS, node), cell(round.BackMS, node)})
		}
		for _, node := range round.Late {
			_ = out.Write([]string{strconv.Itoa(i + 1), round.Kind, round.Victim, node, "", ""})
		}
	}
	out.Flush()
	return out.Error()
}

func cell(ms map[string]float64, node string) string {
	v, ok := ms[node]
	if !ok {
		return ""
	}
	return strconv.FormatFloat(v, 'f', 1, 64)
}
