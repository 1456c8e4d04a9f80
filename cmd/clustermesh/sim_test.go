package main

import (
	"encoding/json"
	"strings"
	"testing"
)

var simArgs = []string{"sim", "gossip", "--nodes", "10", "--clusters", "1,3", "--loss", "1", "--trials", "20"}

func TestSimGossip(t *testing.T) {
	got := cli(t, nil, simArgs...)
	if got.code != exitOK || got.err != "" || strings.Count(got.out, "\n") != 3 || !strings.Contains(got.out, "EVERYWHERE") {
		t.Errorf("got %+v", got)
	}
	if again := cli(t, nil, simArgs...); again != got {
		t.Errorf("the second time it said\n%s\nafter\n%s", again.out, got.out)
	}
	var doc simResult
	got = cli(t, nil, append(simArgs, "-o", "json")...)
	if err := json.Unmarshal([]byte(got.out), &doc); err != nil || len(doc.Rows) != 2 || doc.Rows[1].ClusterEverywhere == nil {
		t.Errorf("%v: %+v", err, got)
	}
	if got := cli(t, nil, append(simArgs, "-o", "yaml")...); got.code != exitOK || !strings.HasPrefix(got.out, "rows:\n") {
		t.Errorf("got %+v", got)
	}
}

func TestSimGossipRefuses(t *testing.T) {
	for args, want := range map[string]string{
		"--nodes 2":                 "2 nodes",
		"--nodes x":                 "invalid argument",
		"--nodes 10 --clusters 255": "no combination",
		"--clusters 0":              "0 clusters",
		"--loss 51":                 "51 % loss",
		"--loss -1":                 "-1 % loss",
		"--trials 0":                "0 trials",
		"--real 1000":               "--real 1000",
		"--suspicion-mult 3":        "suspicion multiplier 3",
		"--probe-interval 1ms":      "probe interval 1ms",
		"--mesh-rtt 1m":             "round trip",
		"-o xml":                    "must be table, json or yaml",
		"extra":                     "extra",
	} {
		got := cli(t, nil, append([]string{"sim", "gossip"}, strings.Fields(args)...)...)
		if got.code != exitNotAsked || got.out != "" || !strings.Contains(got.err, want) || strings.Count(got.err, "\n") != 1 {
			t.Errorf("%s: got %+v, want %q", args, got, want)
		}
	}
}
