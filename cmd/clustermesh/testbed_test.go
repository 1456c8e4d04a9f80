package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"causeway/testbed"
)

func TestTestbedRefusesWithAReason(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"testbed nonsense", exitNotAsked, `unknown command "nonsense"`},
		{"testbed exec east/node1", exitNotAsked, "write it after --"},
		{"testbed exec east/node1 --", exitNotAsked, "write it after --"},
		{"testbed exec east/node1 ls -l", exitNotAsked, "goes after --"},
		{"testbed exec -- ls", exitNotAsked, "name a place"},
		{"testbed exec east -- ls", exitNotAsked, "CLUSTER/pod:NAME"},
		{"testbed pod run east/node1 -- ls", exitNotAsked, "CLUSTER/NODE and NAME"},
		{"testbed pod run east web -- ls", exitNotAsked, "like east/node1"},
		{"testbed pod run east/node1 web --labels app -- ls", exitNotAsked, "KEY=VALUE"},
		{"testbed pod delete web", exitNotAsked, "like east/web"},
		{"testbed kill agent east", exitNotAsked, "like east/node1"},
		{"testbed kill pod east/web", exitNotAsked, "agent, kvstore, node, cluster, wireguard, proxy, kubelet, apiserver, controller-manager or scheduler"},
		{"testbed kill cluster west/node1", exitNotAsked, "name the cluster"},
		{"testbed kill wireguard west", exitNotAsked, "like east/node1"},
		{"testbed kill kvstore", exitNotAsked, "say what and where"},
		{"testbed start kvstore east/node1", exitNotAsked, "name the cluster"},
		{"testbed partition east", exitNotAsked, "two places"},
		{"testbed partition east west --port 7956", exitNotAsked, "like udp/7956"},
		{"testbed loss", exitNotAsked, "how many percent"},
		{"testbed loss some", exitNotAsked, "no number"},
		{"testbed mtu east west", exitNotAsked, "two places"},
		{"testbed mtu east west small", exitNotAsked, "like 1400"},
		{"testbed clock east", exitNotAsked, "by how much"},
		{"testbed clock east -1h --dir x", exitNotAsked, "flags go before"},
		{"testbed clock east later", exitNotAsked, "like +5m or -1h"},
		{"testbed clock east -1h", exitFailed, "clustermesh testbed up --dir " + none},
		{"testbed flap", exitNotAsked, "name the node"},
		{"testbed flap east", exitNotAsked, "like east/node1"},
		{"testbed scenario", exitNotAsked, "name the scenario"},
		{"testbed scenario no-such-file", exitFailed, "no-such-file"},
		{"testbed heal", exitNotAsked, "two places"},
		{"testbed serve", exitNotAsked, "--name"},
		{"testbed serve --name x --listen nonsense", exitFailed, "listening on nonsense"},
		{"testbed load --url 10.0.0.1", exitNotAsked, "http://"},
		{"testbed status -o xml", exitNotAsked, "table, json or yaml"},
		{"testbed status", exitFailed, "clustermesh testbed up --dir " + none},
		{"testbed exec east/node1 -- ls", exitFailed, "clustermesh testbed up --dir " + none},
		{"testbed up --clusters East", exitFailed, "lower case"},
		{"testbed up --nodes 201", exitFailed, "1 to 200"},
		{"testbed up --underlay ipx", exitFailed, "neither ipv4 nor ipv6"},
		{"testbed up --encryption some", exitNotAsked, "is not one of"},
		{"testbed up --encryption west=some", exitNotAsked, "is not one of"},
		{"testbed up --encryption north=off", exitFailed, "the clusters are east, west"},
		{"testbed up --encryption west=off", exitFailed, "refuse to be joined"},
	} {
		args := strings.Fields(c.args)
		if len(args) > 2 || args[1] == "status" {
			args = append([]string{"testbed", "--dir", none}, args[1:]...)
		}
		got := cli(t, nil, args...)
		if got.code != c.code || !strings.Contains(got.err, c.want) || strings.Count(got.err, "\n") != 1 || got.out != "" {
			t.Errorf("%s: code %d, stdout %q, stderr %q; want %d and %q", c.args, got.code, got.out, got.err, c.code, c.want)
		}
	}
}

func TestTestbedDownWithoutOne(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "none")
	if got := cli(t, nil, "testbed", "down", "--dir", dir); got.code != exitOK || !strings.Contains(got.out, "no test-bed in "+dir) {
		t.Errorf("got %+v", got)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("taking down what isn't there has made it")
	}
}

func TestTestbedLoadCountsWhoAnswered(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(testbed.ServedByHeader, "east/web")
	}))
	defer server.Close()
	args := []string{"testbed", "load", "--url", server.URL, "--rate", "1000", "--requests", "20"}
	got := cli(t, nil, append(args, "-o", "json")...)
	var r testbed.LoadResult
	if err := json.Unmarshal([]byte(got.out), &r); err != nil || got.code != exitOK || r.Requests != 20 || r.By["east"] != 20 {
		t.Errorf("%v in %+v", err, got)
	}
	if got := cli(t, nil, args...); !strings.Contains(got.out, "20 requests in") || !strings.Contains(got.out, "east         20") {
		t.Errorf("as a table:\n%s", got.out)
	}
	server.Close()
	if got := cli(t, nil, args...); got.code != exitFailed || !strings.Contains(got.out, "error: connection refused  20") || got.err != "" {
		t.Errorf("without a server: %+v", got)
	}
}

func TestPodBeingMadeHasNoAddress(t *testing.T) {
	var out strings.Builder
	printPods(&printer{w: &out}, []testbed.PodStatus{{Cluster: "east", Node: "node1", Name: "web", State: "creating"}})
	if got := strings.Fields(out.String()); len(got) < 9 || got[8] != "-" {
		t.Errorf("printed %q, want - for the address", out.String())
	}
}

func TestStatusShowsFaults(t *testing.T) {
	var out strings.Builder
	printFaults(&printer{w: &out}, &testbed.Status{
		Partitions: []testbed.Partition{{A: "east", B: "west", OneWay: true, Loss: 100, Port: testbed.Port{Protocol: "UDP", Number: 7956}, Lost: 3}},
		PathMTUs:   []testbed.PathMTU{{A: "east", B: "west", Size: 1400, Lost: 4}},
		Loss:       testbed.Loss{Percent: 5, Lost: 7},
		Clusters:   []testbed.ClusterStatus{{Name: "east", Nodes: []testbed.NodeStatus{{Name: "node1", ClockOffset: -time.Hour}, {Name: "node2"}}}},
	})
	if want := "\npartition: east -> west loses 100 % of udp/7956 (3 so far)\nMTU: east <-> west loses packets over 1400 bytes (4 so far)\n" +
		"every link loses 5 % (7 so far)\nclock of agent east/node1: wrong by -1h0m0s\n"; out.String() != want {
		t.Errorf("got %q", out.String())
	}
}

func TestScenarioCheck(t *testing.T) {
	file := filepath.Join(t.TempDir(), "mine.txt")
	for text, want := range map[string]string{
		"clusters a\nnodes 1\nservice shop on every node\nall is well\n": "mine.txt can be run; steps: 1\n",
		"clusters a\nnodes 1\nservice shop on every node\nall is bad\n":  "error: mine.txt:4: \"all is bad\" is no step that is known; write: all is well\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := cli(t, nil, "testbed", "scenario", "--check", file); got.out+got.err != want {
			t.Errorf("got %+v, want %q", got, want)
		}
	}
}

func TestScenarioEventsAsLines(t *testing.T) {
	var out strings.Builder
	p := &printer{w: &out}
	printScenarioEvent(p, testbed.ScenarioEvent{Line: 7, Step: "kill node west/node2"})
	printScenarioEvent(p, testbed.ScenarioEvent{Line: 7, Step: "within 2s: all is well", Done: true, Took: 1234 * time.Millisecond, Detail: "after 1.23 s"})
	printScenarioEvent(p, testbed.ScenarioEvent{Step: "take everything down", Done: true, Err: os.ErrClosed})
	want := "ok       1.23s     7  within 2s: all is well  after 1.23 s\nFAILED      0s        take everything down\n"
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
}

func TestUnconnectedTestbedTellsHowToJoinItsClusters(t *testing.T) {
	const join = "clustermesh token create --dir --node east/node1 | clustermesh connect --dir --node west/node1\n"
	for _, unconnected := range []bool{true, false} {
		var out strings.Builder
		printUp(&printer{w: &out}, &testbed.Bed{}, testbed.Options{Clusters: []string{"east", "west"}, Unconnected: unconnected})
		if strings.Contains(fields(out.String()), join) != unconnected {
			t.Errorf("unconnected %v: got\n%s", unconnected, out.String())
		}
	}
}
