package testbed

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// described is the description of a bed, of three lines.
const described = "clusters east west\nnodes 2\nservice shop on every node\n"

func mustParse(t *testing.T, steps string, soak bool) *Scenario {
	t.Helper()
	s, err := ParseScenario("x.txt", []byte(described+steps), soak)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestParseScenario(t *testing.T) {
	s := mustParse(t, `
# Comments and blank lines are nothing.
kill node west/node2     # and neither is this
within 2s: no backend of west/node2 in any kernel ; node west/node2 is dead or suspect in every view of east
some node says "one; two # three"
`, false)
	if s.Setup != (Setup{"east west", 2, "shop"}) || len(s.steps) != 3 {
		t.Fatalf("%+v", s)
	}
	kill, expect, said := s.steps[0], s.steps[1], s.steps[2]
	if kill.line != 6 || kill.text != "kill node west/node2" || kill.mode != doing || !kill.action.fault {
		t.Errorf("%+v", kill)
	}
	if expect.line != 7 || expect.mode != within || expect.duration != 2*time.Second || len(expect.conditions) != 2 ||
		expect.conditions[0].needs != lookKernels || expect.conditions[1].needs != lookViews {
		t.Errorf("%+v", expect)
	}
	if said.mode != now || len(said.conditions) != 1 || said.conditions[0].needs != lookStatus {
		t.Errorf("%+v", said)
	}
}

func TestSoakTakesTheLongerDuration(t *testing.T) {
	for soak, want := range map[bool]time.Duration{false: 15 * time.Second, true: 10 * time.Minute} {
		st := mustParse(t, "for 15s, or 10m in a soak: all is well\n", soak).steps[0]
		if st.duration != want || st.text != "for 15s, or 10m in a soak: all is well" {
			t.Errorf("soak %v: %v of %q", soak, st.duration, st.text)
		}
	}
}

// Whatever is not understood is refused with its line, and with what could stand there.
func TestScenarioIsStrict(t *testing.T) {
	for steps, want := range map[string]string{
		"kil node west/node2":                                        `no step begins with "kil"`,
		"kill west/node2":                                            "write: kill KIND PLACE",
		"kill pod west/web":                                          "agent, kvstore, node, cluster, wireguard, proxy, kubelet, apiserver, controller-manager or scheduler",
		"kill node west":                                             "like east/node1",
		"kill node west/node3":                                       "node1 to node2",
		"kill cluster south":                                         "it has east west",
		"kill node west/node2 now":                                   "is no step that is known",
		"partition east west":                                        "partition PLACE from PLACE",
		"partition east from east":                                   "the same place",
		"partition east from west/nodex":                             `no node "nodex"`,
		"block 7956 between east and west":                           "like udp/7956",
		"lose 5 of packets everywhere":                               "like 5%",
		"lose 500% of packets everywhere":                            "at most 100",
		"traffic 50 from every cluster":                              "like 5/s",
		"traffic 50/s from south":                                    `no cluster "south"`,
		"mtu east west":                                              "mtu PLACE PLACE SIZE",
		"start wireguard west/node1":                                 "started by the node's agent",
		"mtu east west small":                                        "like 1400",
		"mtu east west 20":                                           "68 to 65535",
		"mtu east east 1400":                                         "the same place",
		"mtu east south 1400":                                        `no cluster "south"`,
		"clock east":                                                 "clock PLACE OFFSET",
		"clock east soon":                                            "like +5m",
		"clock south +5m":                                            `no cluster "south"`,
		"clock east/kvstore +5m":                                     "no node",
		"flap west/node1 down 0s up 1s for 1s":                       "no duration",
		"run server Shop on west/node1":                              "lower case",
		"delete server shop":                                         "CLUSTER/NAME",
		"churn servers in west every now and then":                   "churn servers in CLUSTER every DURATION",
		"wait a while":                                               "wait DURATION",
		"within 2: all is well":                                      "no duration",
		"within 2s, all is well":                                     `no step begins with "within"`,
		"within 2s: all is fine":                                     "write: all is well",
		"within 2s:":                                                 `no step begins with "within"`,
		"within 2s: all is well;":                                    "missing",
		"within 2s: no request failed":                               "below: stop traffic",
		"for 2s, or long in a soak: all is well":                     "no duration",
		"node west/node1 is sleepy in every view":                    "alive, agent-down, suspect, dead, left",
		"cluster west is dead in every view":                         "reachable, unreachable",
		"node west/node1 is dead or":                                 "is no step that is known",
		"few backends in every kernel":                               "no number of backends",
		"9 backends in some kernels":                                 "N backends in every kernel",
		"some node says UDP":                                         "double quotes",
		`some node says "UDP`:                                        "has no end",
		"up to here":                                                 "from here on",
		"from here on: all is well\nup to here\nup to here":          "from here on",
		"from here on: all is well\nclusters a b":                    "above all steps",
		"requests failed only within moments after a fault":          "no duration",
		"server west/shop-node1 answered requests from west/client":  "no cluster",
		"no transitions but of east or west in any view":             "is no step that is known",
		"every backend of west/pod:client in every kernel of nobody": "no node",
	} {
		_, err := ParseScenario("x.txt", []byte(described+steps), false)
		if err == nil || !strings.Contains(err.Error(), want) || !regexp.MustCompile(`^x\.txt:[4-6]: `).MatchString(err.Error()) {
			t.Errorf("%q: %v, want %q", steps, err, want)
		}
	}
	for text, want := range map[string]string{
		"":                           "the bed is not described",
		"clusters east":              "the bed is not described",
		"nodes 2\nall is well":       "x.txt:2: the bed is not described",
		"nodes many":                 "like: nodes 3",
		"clusters":                   "like: clusters east west",
		"service shop everywhere":    "service NAME on every node",
		"service Shop on every node": "lower case",
		"clusters east east\nnodes 1\nservice shop on every node":   "named twice",
		"clusters east\nnodes 1000\nservice shop on every node":     "1 to 200",
		"clusters Upper\nnodes 1\nservice shop on every node\nheal": "x.txt:4",
	} {
		if _, err := ParseScenario("x.txt", []byte(text), false); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// The scenarios that are there can be read, in both ways.
func TestScenarioFilesAreValid(t *testing.T) {
	files, err := filepath.Glob("testdata/scenarios/*.txt")
	if err != nil || len(files) < 10 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		for _, soak := range []bool{false, true} {
			if _, err := ReadScenario(file, soak); err != nil {
				t.Error(err)
			}
		}
	}
}

// The documentation has each step that there is, and examples that can be read.
func TestScenarioDocs(t *testing.T) {
	text, err := os.ReadFile("../docs/scenarios.md")
	if err != nil {
		t.Fatal(err)
	}
	var patterns []string
	for _, p := range actions {
		patterns = append(patterns, p.pattern)
	}
	for _, p := range conditions {
		patterns = append(patterns, p.pattern)
	}
	for _, p := range patterns {
		if !strings.Contains(string(text), "| `"+p+"` |") {
			t.Errorf("docs/scenarios.md does not explain %q", p)
		}
	}
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(string(text), -1) {
		known := false
		for _, p := range append(patterns, "clusters NAME…", "nodes N", "service NAME on every node", "CONDITION", "within DURATION: CONDITION", "for DURATION: CONDITION", "from here on: CONDITION", "up to here") {
			known = known || p == row[1]
		}
		if !known {
			t.Errorf("docs/scenarios.md explains %q, which there is not", row[1])
		}
	}
	examples := regexp.MustCompile("(?s)```scenario\n(.*?)```").FindAllStringSubmatch(string(text), -1)
	if len(examples) == 0 {
		t.Error("docs/scenarios.md has no example")
	}
	for _, e := range examples {
		if _, err := ParseScenario("docs/scenarios.md", []byte(e[1]), false); err != nil {
			t.Error(err)
		}
	}
}
