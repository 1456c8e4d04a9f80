package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"causeway/agent/api"
	"causeway/lb"

	"github.com/spf13/cobra"
	"go.uber.org/goleak"
)

// The test's own binary is the clustermesh of the test-beds that it brings up.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "clustermesh" {
		main()
	}
	goleak.VerifyTestMain(m)
}

// fakeAgent answers on a socket of its own with the bodies it is given, by "METHOD path".
type fakeAgent struct {
	socket  string
	answers map[string]string
	asked   []string // "METHOD path body" of what changes something
}

func newFakeAgent(t *testing.T, answers map[string]string) *fakeAgent {
	t.Helper()
	a := &fakeAgent{answers: answers}
	a.socket = serveAgent(t, a)
	return a
}

// serveAgent answers with h on a socket, and returns that.
func serveAgent(t *testing.T, h http.Handler) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "agent.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close(); <-done })
	return socket
}

func (a *fakeAgent) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		body, _ := io.ReadAll(r.Body)
		a.asked = append(a.asked, fmt.Sprintf("%s %s %s", r.Method, r.URL.RequestURI(), body))
	}
	answer, ok := a.answers[r.Method+" "+r.URL.Path]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		io.WriteString(w, `{"error":"there is no such thing"}`)
		return
	}
	io.WriteString(w, answer)
}

// result is what a command left behind.
type result struct {
	code     int
	out, err string
}

// cli runs a command line in process, in a fixed minute, with variables in place of the environment.
func cli(t *testing.T, vars map[string]string, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	code := run(t.Context(), testEnv(&out, &errs, vars), args)
	return result{code, out.String(), errs.String()}
}

func testEnv(out, errs io.Writer, vars map[string]string) *env {
	return &env{
		in: strings.NewReader("from stdin\n"), out: out, err: errs,
		now:     func() time.Time { return time.Date(2025, 6, 1, 12, 0, 0, 0, time.UTC) },
		getenv:  func(k string) string { return vars[k] },
		connect: api.NewClient,
		testbed: fakeTestbed{},
	}
}

// fakeTestbed knows node east/node1 only.
type fakeTestbed struct{}

func (fakeTestbed) SocketOf(dir, node string) (string, error) {
	if node != "east/node1" {
		return "", fmt.Errorf("no node %q in this test-bed", node)
	}
	return filepath.Join(dir, "agent.sock"), nil
}
func (fakeTestbed) SocketHere() (string, bool) { return "", false }
func (fakeTestbed) Nodes(string) []string      { return []string{"east/node1"} }

const statusOK = `{"ok":true,"problems":[],"version":"v1","cluster":"east","clusterID":1,"node":"node1","address":"172.29.1.11",
"podCIDR":"10.1.1.0/24","started":"2025-06-01T11:57:00Z","datapath":{"attach":"tcx","device":"causeway0","podMTU":1450,"drops":3},
"stores":[{"cluster":"east","clusterID":1,"local":true,"endpoints":["https://172.29.1.2:2379"],"connected":true,"synced":true,"entries":12,"heartbeatAgeMs":400},
{"cluster":"west","clusterID":2,"endpoints":["https://172.29.2.2:2379"],"lastError":"dial tcp: refused","refused":1,"reconnects":2,"heartbeatAgeMs":-1}],
"tables":{"nodes":{"rows":4},"addresses":{"rows":20,"pending":1}},
"refusals":[{"cluster":"west","key":"addresses/east/10.1.1.1","reason":"not west's\u001b[31m to say","count":1,"last":"2025-06-01T11:59:00Z"}]}`

func TestStatus(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/status": statusOK})
	got := cli(t, nil, "status", "--socket", a.socket)
	want := `east/node1: ok
  cluster ID 1, address 172.29.1.11, pods 10.1.1.0/24
  data path tcx on causeway0, pod MTU 1450, 3 packets dropped
  version v1, up 3m

STORE       ENDPOINTS                ENTRIES  REFUSED  RECONNECTS  HEARTBEAT  STATUS
east (own)  https://172.29.1.2:2379  12       0        0           400ms ago  synced
west        https://172.29.2.2:2379  0        1        2           none       away: dial tcp: refused

TABLE      ROWS  PENDING  ERRORS
addresses  20    1        0
nodes      4     0        0

REFUSED FROM  TIMES  LAST    KEY                      REASON
west          1      1m ago  addresses/east/10.1.1.1  not west's\x1b[31m to say
`
	if got.code != exitOK || got.err != "" || got.out != want {
		t.Errorf("got code %d, stderr %q, stdout\n%s\nwant\n%s", got.code, got.err, got.out, want)
	}
}

func TestStatusWithProblemsExitsWith1(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/status": `{"ok":false,"problems":["store west is away"],"cluster":"east","node":"node1"}`})
	got := cli(t, nil, "status", "--socket", a.socket)
	if got.code != exitFailed || got.err != "" || !strings.Contains(got.out, "east/node1: problems\n  - store west is away\n") {
		t.Errorf("got %+v", got)
	}
}

// lists holds, for each list, one row and what has to be seen of it.
var lists = []struct {
	args   []string
	path   string
	answer string
	table  string
}{
	{[]string{"node", "list"}, "/v1/nodes",
		`[{"cluster":"west","clusterID":2,"name":"node2","address":"172.29.2.12","podCIDRs":["10.2.2.0/24"],"instance":"x","incarnation":1,"sequence":2,"status":{"kind":"error","error":"no route"}}]`,
		"NODE        ADDRESS      PODS         HERE  STATUS\nwest/node2  172.29.2.12  10.2.2.0/24  no    error: no route\n"},
	{[]string{"endpoint", "list"}, "/v1/endpoints",
		`[{"namespace":"default","name":"shop-1","labels":{"app":"shop"},"identity":65792,"address":"10.1.1.5","state":"ready","hostLink":"cw1","status":{"kind":"done"}}]`,
		"ENDPOINT        ADDRESS   IDENTITY  LABELS    LINK  STATE  STATUS\ndefault/shop-1  10.1.1.5  65792     app=shop  cw1   ready  done\n"},
	{[]string{"node", "list"}, "/v1/nodes",
		`[{"cluster":"west","clusterID":2,"name":"node2","address":"2001:db8::12","podCIDRs":["10.2.2.0/24","fd00:10:2:2::/64"],"instance":"x","incarnation":1,"sequence":2,"status":{"kind":"done"}}]`,
		"NODE        ADDRESS       PODS                           HERE  STATUS\nwest/node2  2001:db8::12  10.2.2.0/24, fd00:10:2:2::/64  no    done\n"},
	{[]string{"endpoint", "list"}, "/v1/endpoints",
		`[{"namespace":"default","name":"shop-1","labels":{"app":"shop"},"identity":65792,"address":"10.1.1.5","address6":"fd00:10:1:1::5","state":"ready","hostLink":"cw1","status":{"kind":"done"}}]`,
		"ENDPOINT        ADDRESS                   IDENTITY  LABELS    LINK  STATE  STATUS\ndefault/shop-1  10.1.1.5, fd00:10:1:1::5  65792     app=shop  cw1   ready  done\n"},
	{[]string{"identity", "list"}, "/v1/identities",
		`[{"cluster":"east","id":65792,"labels":{"app":"shop"}}]`,
		"IDENTITY  CLUSTER  LABELS\n65792     east     app=shop\n"},
	{[]string{"address", "list"}, "/v1/addresses",
		`[{"cluster":"west","clusterID":2,"prefix":"10.2.1.7/32","identity":131328,"node":"node1","nodeAddress":"172.29.2.11","status":{"kind":"pending"}}]`,
		"PREFIX       IDENTITY  NODE        NODE ADDRESS  ENDPOINT  STATUS\n10.2.1.7/32  131328    west/node1  172.29.2.11   -         pending\n"},
	{[]string{"service", "list"}, "/v1/services", serviceAnswer,
		"SERVICE       FRONTEND              OWNER  DECLARED BY  AFFINITY  L7       BACKENDS        STATUS\n" +
			"default/shop  100.64.64.1:80/TCP  east   east (global), west  nearest   random  east 1, west 2  pending\n"},
	{[]string{"bpf", "lb", "list"}, "/v1/bpf/lb",
		`[{"address":"100.64.64.1","port":80,"protocol":"TCP","serviceID":1,"service":"default/shop","affinity":"none","quarantined":[],"backends":[{"id":1,"slot":0,"group":"local","address":"10.1.1.5","port":8080,"cluster":"east","node":"node1","endpoint":"default/shop-1"}]}]`,
		"FRONTEND            SERVICE       LEVEL  AFFINITY  GROUP  SLOT  BACKEND            STATE   NODE        ENDPOINT\n" +
			"100.64.64.1:80/TCP  default/shop  L4     none      local  0     10.1.1.5:8080/TCP  active  east/node1  default/shop-1\n"},
	{[]string{"bpf", "address", "list"}, "/v1/bpf/addresses",
		`[{"prefix":"10.1.1.5/32","identity":65792,"labels":"app=shop","node":"node1","cluster":"east","endpoint":"default/shop-1"},
		{"prefix":"10.2.1.5/32","identity":131328,"node":"node1","cluster":"west","tunnel":"172.29.2.11"},{"prefix":"10.2.0.0/16","identity":0,"blackhole":true}]`,
		"PREFIX IDENTITY LABELS NODE ENDPOINT WHERE\n10.1.1.5/32 65792 app=shop east/node1 default/shop-1 this node\n" +
			"10.2.1.5/32 131328 - west/node1 - tunnel to 172.29.2.11\n10.2.0.0/16 unknown - - - nowhere\n"},
	{[]string{"bpf", "drops"}, "/v1/bpf/drops",
		`[{"reason":"identity-spoofed","direction":"ingress","packets":2,"bytes":180}]`,
		"REASON            DIRECTION  PACKETS  BYTES\nidentity-spoofed  ingress    2        180\n"},
}

const bpfLBAnswer = `[
{"address":"100.64.64.1","port":80,"protocol":"TCP","serviceID":1,"service":"default/shop","affinity":"none",
"backends":[{"id":1,"slot":0,"group":"local","address":"10.1.1.5","port":8080,"cluster":"east","node":"node1","endpoint":"default/shop-1"}],
"quarantined":[{"id":2,"slot":0,"group":"remote","address":"10.2.1.5","port":8080,"cluster":"west","node":"node1","endpoint":"default/shop-1"}]},
{"address":"100.64.64.2","port":80,"protocol":"TCP","serviceID":2,"service":"default/cart","l7":true,"affinity":"none","failOpen":true,
"backends":[{"id":3,"slot":0,"group":"remote","address":"10.2.1.6","port":8080,"cluster":"west","node":"node1"}],"quarantined":[]},
{"address":"100.64.64.3","port":80,"protocol":"TCP","serviceID":3,"service":"default/till","affinity":"none","backends":[],"quarantined":[]}]`

// dualStackAnswer is of a service whose only backend has no IPv6 address.
const dualStackAnswer = `[{"service":{"namespace":"default","name":"shop"},
"declared":[{"cluster":"east","service":{"namespace":"default","name":"shop"},"global":true,"shared":true}],
"frontends":[
{"address":"100.64.64.1","port":80,"protocol":"TCP","target":{"service":{"namespace":"default","name":"shop"},"port":"80","protocol":"TCP","family":4},"cluster":"east","affinity":"none","status":{"kind":"done"}},
{"address":"fd00:1::1","port":80,"protocol":"TCP","target":{"service":{"namespace":"default","name":"shop"},"port":"80","protocol":"TCP","family":6},"cluster":"east","affinity":"none","status":{"kind":"done"}}],
"backends":[
{"port":{"service":{"namespace":"default","name":"shop"},"port":"80","protocol":"TCP","family":4},"address":"10.1.1.5","number":8080,"cluster":"east","status":{"kind":"done"}}]}]`

const serviceAnswer = `[{"service":{"namespace":"default","name":"shop"},
"declared":[{"cluster":"east","service":{"namespace":"default","name":"shop"},"global":true,"shared":true},{"cluster":"west","service":{"namespace":"default","name":"shop"}}],
"frontends":[{"address":"100.64.64.1","port":80,"protocol":"TCP","target":{"service":{"namespace":"default","name":"shop"},"port":"80","protocol":"TCP"},"cluster":"east","affinity":"none","l7":true,"status":{"kind":"done"}}],
"routes":[{"port":{"service":{"namespace":"default","name":"shop"},"port":"80","protocol":"TCP"},"number":80,"options":{"algorithm":"random","affinity":"nearest"}}],
"backends":[
{"port":{"service":{"namespace":"default","name":"shop"},"port":"80","protocol":"TCP"},"address":"10.1.1.5","number":8080,"cluster":"east","status":{"kind":"done"}},
{"port":{"service":{"namespace":"default","name":"shop"},"port":"80","protocol":"TCP"},"address":"10.2.1.5","number":8080,"cluster":"west","status":{"kind":"pending"}},
{"port":{"service":{"namespace":"default","name":"shop"},"port":"80","protocol":"TCP"},"address":"10.2.1.6","number":8080,"cluster":"west","status":{"kind":"done"}}]}]`

func TestListsAsTables(t *testing.T) {
	for _, l := range lists {
		t.Run(strings.Join(l.args, " "), func(t *testing.T) {
			a := newFakeAgent(t, map[string]string{"GET " + l.path: l.answer})
			got := cli(t, nil, append(l.args, "--socket", a.socket)...)
			if got.code != exitOK || got.err != "" || fields(got.out) != fields(l.table) {
				t.Errorf("got code %d, stderr %q, stdout\n%s\nwant\n%s", got.code, got.err, got.out, l.table)
			}
		})
	}
}

// fields leaves one blank between words, so that tests needn't count columns.
func fields(s string) string {
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		lines[i] = strings.Join(strings.Fields(l), " ")
	}
	return strings.Join(lines, "\n")
}

// nodePortAnswer is of a service with a node port whose clients from outside stay on the node, which has one of its two backends.
const nodePortAnswer = `[{"service":{"namespace":"default","name":"shop"},
	"declared":[{"cluster":"east","clusterID":1,"service":{"namespace":"default","name":"shop"},"clusterIPs":["100.64.64.1"],"ports":[{"protocol":"TCP","port":80,"targetPort":8080,"nodePort":30080}],"externalLocal":true}],
	"frontends":[
		{"address":"172.29.1.11","port":30080,"protocol":"TCP","target":{"service":{"namespace":"default","name":"shop"},"port":"80","protocol":"TCP","family":4},"cluster":"east","clusterID":1,"affinity":"none","status":{"kind":"done"}},
		{"address":"172.29.1.11","port":30080,"protocol":"TCP","outside":true,"target":{"service":{"namespace":"default","name":"shop"},"port":"80","protocol":"TCP","family":4,"nodeLocal":true},"cluster":"east","clusterID":1,"affinity":"none","status":{"kind":"done"}}],
	"backends":[
		{"port":{"service":{"namespace":"default","name":"shop"},"port":"80","protocol":"TCP","family":4},"address":"10.1.1.5","number":8080,"cluster":"east","clusterID":1,"node":"node1","local":true,"status":{"kind":"done"}},
		{"port":{"service":{"namespace":"default","name":"shop"},"port":"80","protocol":"TCP","family":4},"address":"10.1.2.5","number":8080,"cluster":"east","clusterID":1,"node":"node2","local":true,"status":{"kind":"done"}},
		{"port":{"service":{"namespace":"default","name":"shop"},"port":"80","protocol":"TCP","family":4,"nodeLocal":true},"address":"10.1.1.5","number":8080,"cluster":"east","clusterID":1,"node":"node1","local":true,"status":{"kind":"done"}}]}]`

func TestServiceListCountsTheBackendsOfAnAddressesFamily(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/services": dualStackAnswer})
	got := cli(t, nil, "service", "list", "--socket", a.socket)
	want := `SERVICE       FRONTEND             OWNER  DECLARED BY    AFFINITY  L7 BACKENDS  STATUS
default/shop  100.64.64.1:80/TCP   east   east (global)  none  -    east 1    done
default/shop  [fd00:1::1]:80/TCP  east   east (global)  none  -    none      done
`
	if got.code != exitOK || fields(got.out) != fields(want) {
		t.Errorf("got code %d, stderr %q, stdout\n%s\nwant\n%s", got.code, got.err, got.out, want)
	}
}

func TestServiceListTellsClientsFromOutsideApart(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/services": nodePortAnswer})
	got := cli(t, nil, "service", "list", "--socket", a.socket)
	want := `SERVICE       FRONTEND                            OWNER  DECLARED BY  AFFINITY  L7 BACKENDS  STATUS
default/shop  172.29.1.11:30080/TCP               east   east         none      -  east 2    done
default/shop  172.29.1.11:30080/TCP from outside  east   east         none      -  east 1    done
`
	if got.code != exitOK || fields(got.out) != fields(want) {
		t.Errorf("got code %d, stderr %q, stdout\n%s\nwant\n%s", got.code, got.err, got.out, want)
	}
}

func TestBPFLBShowsWhoGetsConnections(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/bpf/lb": bpfLBAnswer})
	got := cli(t, nil, "bpf", "lb", "list", "--socket", a.socket)
	want := `FRONTEND            SERVICE       LEVEL  AFFINITY  GROUP   SLOT  BACKEND            STATE               NODE        ENDPOINT
100.64.64.1:80/TCP  default/shop  L4     none      local   0     10.1.1.5:8080/TCP  active              east/node1  default/shop-1
100.64.64.1:80/TCP  default/shop  L4     none      remote  0     10.2.1.5:8080/TCP  quarantined         west/node1  default/shop-1
100.64.64.2:80/TCP  default/cart  L7     none      remote  0     10.2.1.6:8080/TCP  active (fail open)  west/node1  -
100.64.64.3:80/TCP  default/till  L4     none      -       -     none               -                   -           -
`
	if got.code != exitOK || got.out != want {
		t.Errorf("got code %d, stderr %q, stdout\n%s\nwant\n%s", got.code, got.err, got.out, want)
	}
}

func TestListsAsJSONAndYAMLAreTheAPI(t *testing.T) {
	for _, l := range lists {
		a := newFakeAgent(t, map[string]string{"GET " + l.path: l.answer})
		args := append(l.args, "--socket", a.socket, "-o")
		got := cli(t, nil, append(args, "json")...)
		for _, name := range topKeys(t, l.answer) {
			if !strings.Contains(got.out, fmt.Sprintf("%q:", name)) {
				t.Errorf("%v: -o json has no %q:\n%s", l.args, name, got.out)
			}
		}
		var doc []any
		if err := json.Unmarshal([]byte(got.out), &doc); err != nil || len(doc) != strings.Count(l.table, "\n")-1 {
			t.Errorf("%v: -o json: %v, %d rows", l.args, err, len(doc))
		}
		if yaml := cli(t, nil, append(args, "yaml")...); yaml.code != exitOK || !strings.HasPrefix(yaml.out, "- ") {
			t.Errorf("%v: -o yaml: %+v", l.args, yaml)
		}
	}
}

func topKeys(t *testing.T, answer string) (keys []string) {
	t.Helper()
	var rows []map[string]any
	if err := json.Unmarshal([]byte(answer), &rows); err != nil {
		t.Fatal(err)
	}
	for k := range rows[0] {
		keys = append(keys, k)
	}
	return keys
}

func TestWatchPrintsEachState(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/identities": "[]\n" + `[{"cluster":"east","id":65792,"labels":{"app":"shop"}}]` + "\n"})
	got := cli(t, nil, "identity", "list", "--watch", "-o", "json", "--socket", a.socket)
	if want := "[]\n" + `[{"cluster":"east","id":65792,"labels":{"app":"shop"}}]` + "\n"; got.out != want {
		t.Errorf("got %q, want %q", got.out, want)
	}
	// That the agent goes away ends it, with the reason.
	if got.code != exitFailed || !strings.Contains(got.err, "ended the watch") {
		t.Errorf("got code %d, stderr %q", got.code, got.err)
	}
	got = cli(t, nil, "identity", "list", "--watch", "--socket", a.socket)
	if want := "12:00:00.000\nIDENTITY  CLUSTER  LABELS\n\n12:00:00.000\nIDENTITY  CLUSTER  LABELS\n65792     east     app=shop\n\n"; got.out != want {
		t.Errorf("got %q, want %q", got.out, want)
	}
}

func TestColourOnTerminalsOnly(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET " + lists[0].path: lists[0].answer})
	for _, tc := range []struct {
		terminal bool
		noColor  string
		want     bool
	}{{true, "", true}, {true, "1", false}, {false, "", false}} {
		var out, errs bytes.Buffer
		e := testEnv(&out, &errs, map[string]string{"NO_COLOR": tc.noColor})
		e.terminal = tc.terminal
		run(t.Context(), e, []string{"node", "list", "--socket", a.socket})
		if got := strings.Contains(out.String(), "\x1b["); got != tc.want {
			t.Errorf("terminal %v, NO_COLOR=%q: coloured %v:\n%s", tc.terminal, tc.noColor, got, out.String())
		}
	}
}

func TestServiceApplyAndDelete(t *testing.T) {
	a := newFakeAgent(t, map[string]string{
		"POST /v1/services":                `[{"service":{"namespace":"default","name":"shop"},"action":"created","clusterIPs":["100.64.64.1"]}]`,
		"DELETE /v1/services/default/shop": "",
	})
	file := filepath.Join(t.TempDir(), "shop.yaml")
	if err := os.WriteFile(file, []byte("kind: Service\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ args, out, asked string }{
		{"service apply -f " + file, "service default/shop created at 100.64.64.1\n", "POST /v1/services kind: Service\n"},
		{"service apply -f -", "service default/shop created at 100.64.64.1\n", "POST /v1/services from stdin\n"},
		{"service delete default/shop", "service default/shop deleted\n", "DELETE /v1/services/default/shop "},
	} {
		a.asked = nil
		got := cli(t, map[string]string{api.SocketEnv: a.socket}, strings.Fields(tc.args)...)
		if got.code != exitOK || got.out != tc.out || fmt.Sprint(a.asked) != fmt.Sprint([]string{tc.asked}) {
			t.Errorf("%s: got %+v, asked %q", tc.args, got, a.asked)
		}
	}
}

func TestErrorsAreOneLineWithTheirCode(t *testing.T) {
	a := newFakeAgent(t, nil)
	for _, tc := range []struct {
		args string
		code int
		err  string
	}{
		{"nonsense", exitNotAsked, `unknown command "nonsense"`},
		{"node nonsense", exitNotAsked, `unknown command "nonsense" for "clustermesh node"`},
		{"node list extra", exitNotAsked, `unknown command "extra"`},
		{"node list --nonsense", exitNotAsked, "unknown flag: --nonsense"},
		{"node list -o xml", exitNotAsked, "must be table, json or yaml"},
		{"kvstore", exitNotAsked, `"data-dir"`},
		{"service delete shop", exitNotAsked, "NAMESPACE/NAME"},
		{"service delete", exitNotAsked, "accepts 1 arg"},
		{"service apply", exitNotAsked, "-f FILE"},
		{"service apply -f /does/not/exist", exitFailed, "no such file"},
		{"node list --socket x --node east/node1", exitNotAsked, "give one of them"},
		{"node list --socket /does/not/exist", exitNotAsked, "no agent is running at /does/not/exist"},
		{"node list --node east/node1 --dir /does/not", exitNotAsked, "no agent is running at /does/not/agent.sock"},
		{"node list --node west/node1", exitNotAsked, `no node "west/node1"`},
		{"service delete default/shop --socket " + a.socket, exitFailed, "there is no such thing"},
	} {
		got := cli(t, nil, strings.Fields(tc.args)...)
		if got.code != tc.code || got.out != "" || !strings.HasPrefix(got.err, "error: ") ||
			strings.Count(got.err, "\n") != 1 || !strings.Contains(got.err, tc.err) {
			t.Errorf("%s: got %+v, want code %d and %q", tc.args, got, tc.code, tc.err)
		}
	}
}

func TestInterruptedWatchIsNoFailure(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/nodes": "[]\n"})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out, errs bytes.Buffer
	if code := run(ctx, testEnv(&out, &errs, nil), []string{"node", "list", "--watch", "--socket", a.socket}); code != exitOK || errs.String() != "" {
		t.Errorf("got code %d, stderr %q", code, errs.String())
	}
}

func TestEveryCommandHasHelpWithAnExample(t *testing.T) {
	root, _ := newRootCommand(testEnv(io.Discard, io.Discard, nil))
	var visit func(*cobra.Command)
	visit = func(c *cobra.Command) {
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
			return
		}
		if c.Short == "" || c.Example == "" {
			t.Errorf("%s: needs a Short and an Example", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			visit(sub)
		}
	}
	visit(root)
}

func TestWorstStatusOfAFrontend(t *testing.T) {
	done, failed := api.RowStatus{Kind: "done"}, api.RowStatus{Kind: "error", Error: "map full"}
	port := lb.PortKey{Port: "80"}
	backend := func(s api.RowStatus) api.Backend {
		return api.Backend{Target: lb.Target{TargetKey: lb.TargetKey{Port: port}}, Status: s}
	}
	f := api.Frontend{Frontend: lb.Frontend{Target: port}, Status: done}
	if got := worst(f, []api.Backend{backend(done), backend(failed), backend(done)}); got != failed {
		t.Errorf("got %+v", got)
	}
	if got := worst(f, nil); got != done {
		t.Errorf("got %+v", got)
	}
}
