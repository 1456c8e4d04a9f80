package main

import (
	"strings"
	"testing"
)

const l7Answer = `{"fallbacks":3,"routes":[
{"port":{"service":{"namespace":"default","name":"shop"},"port":"http","protocol":"TCP","family":4},"number":80,"appProtocol":"http","options":{"algorithm":"round_robin","affinity":"none","weights":[{"cluster":"east","weight":90},{"cluster":"west","weight":10}]}},
{"port":{"service":{"namespace":"default","name":"till"},"port":"80","protocol":"TCP","family":6},"number":80,"options":{"algorithm":"hash","hashHeader":"x-user","affinity":"nearest"}}],
"proxies":[{"pid":42,"version":"a","synced":true,"ports":[
{"route":{"port":{"service":{"namespace":"default","name":"shop"},"port":"http","protocol":"TCP","family":4},"number":80,"options":{"algorithm":"round_robin"}},"frontends":["100.64.64.1:80"],
"backends":[
{"port":{"service":{"namespace":"default","name":"shop"},"port":"http","protocol":"TCP","family":4},"address":"10.1.1.5","number":8080,"cluster":"east","node":"node1","requests":90},
{"port":{"service":{"namespace":"default","name":"shop"},"port":"http","protocol":"TCP","family":4},"address":"10.2.1.5","number":8080,"cluster":"west","node":"node1","requests":10,"failures":5,"unhealthy":true,"reason":"503"},
{"port":{"service":{"namespace":"default","name":"shop"},"port":"http","protocol":"TCP","family":4},"address":"10.2.1.6","number":8080,"cluster":"west","node":"node1","ejected":true,"ejections":1}],
"stats":{"requests":100,"inFlight":2,"retries":1,"codes":{"200":95,"503":5},"clusters":{"east":90,"west":10},"tcp":0,"p50Ms":1.25,"p99Ms":20,"sample":100}}]}]}`

func TestL7List(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/l7": l7Answer})
	got := cli(t, nil, "l7", "list", "--socket", a.socket)
	want := `SERVICE            FAMILY  FRONTENDS       PROTOCOL   ALGORITHM              CLUSTERS         BACKENDS            STATUS
default/shop:http  IPv4    100.64.64.1:80  http       round_robin            east=90,west=10  east 1/1, west 0/2  done
default/till:80    IPv6    -               found out  hash of header x-user  nearest          -                   pending
`
	if got.code != exitOK || got.out != want {
		t.Errorf("got code %d, stderr %q, stdout\n%s\nwant\n%s", got.code, got.err, got.out, want)
	}
	a.answers["GET /v1/l7"] = strings.Replace(l7Answer, `"synced":true,`, `"synced":true,"draining":true,`, 1)
	if got := cli(t, nil, "l7", "list", "--socket", a.socket); !strings.Contains(got.out, "no proxy, balanced at L4") {
		t.Errorf("without a proxy in service it lists\n%s", got.out)
	}
}

func TestL7Stats(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/l7": l7Answer})
	got := cli(t, nil, "l7", "stats", "default/shop", "--socket", a.socket)
	want := `SERVICE            REQUESTS  IN FLIGHT  RETRIES  P50     P99      TCP  CLUSTERS           CODES
default/shop:http  100       2          1        1.2 ms  20.0 ms  0    east: 90, west: 10  200: 95, 503: 5

SERVICE            BACKEND            NODE        REQUESTS  IN FLIGHT  FAILURES  EJECTIONS  STATE
default/shop:http  10.1.1.5:8080/TCP  east/node1  90        0          0         0          well
default/shop:http  10.2.1.5:8080/TCP  west/node1  10        0          5         0          dead: 503
default/shop:http  10.2.1.6:8080/TCP  west/node1  0         0          0         1          suspect: ejected
`
	if got.code != exitOK || strings.Join(strings.Fields(got.out), " ") != strings.Join(strings.Fields(want), " ") {
		t.Errorf("got code %d, stderr %q, stdout\n%s\nwant\n%s", got.code, got.err, got.out, want)
	}
	if got := cli(t, nil, "l7", "stats", "default/cart", "--socket", a.socket); got.code != exitFailed || !strings.Contains(got.err, "default/cart is not balanced at L7") {
		t.Errorf("of another service: %+v", got)
	}
	if got := cli(t, nil, "l7", "stats", "-o", "json", "--socket", a.socket); got.code != exitOK || !strings.Contains(got.out, `"requests": 100`) {
		t.Errorf("as JSON: %+v", got)
	}
}

func TestL7TapAndUpgrade(t *testing.T) {
	a := newFakeAgent(t, map[string]string{
		"GET /v1/l7/tap":      `{"time":"2025-06-01T12:00:00Z","service":"default/shop:http","protocol":"http/1.1","client":"default/client","method":"GET","host":"shop","path":"/cart","status":200,"backend":"10.1.1.5:8080","cluster":"east","retries":1,"tookMs":1.5}` + "\n",
		"POST /v1/l7/upgrade": `{"pid":43,"before":42}`,
	})
	got := cli(t, nil, "l7", "tap", "default/shop", "--sample", "10", "--socket", a.socket)
	if want := "default/shop:http  http/1.1  default/client  GET  shop/cart  →  east 10.1.1.5:8080  200  1.5 ms  after 1 retries"; !strings.Contains(got.out, want) {
		t.Errorf("got %q, want %q", got.out, want)
	}
	if got.code != exitFailed || !strings.Contains(got.err, "the agent at "+a.socket+" ended the watch") {
		t.Errorf("when the agent ends: code %d, %s", got.code, got.err)
	}
	if got := cli(t, nil, "l7", "upgrade", "--socket", a.socket); got.code != exitOK || got.out != "process 43 serves; process 42 finishes what it has\n" {
		t.Errorf("upgrade: %+v", got)
	}
	for args, want := range map[string]string{
		"l7 tap shop":                        "NAMESPACE/NAME",
		"l7 tap default/shop --sample 0":     "percentage",
		"l7 stats shop":                      "NAMESPACE/NAME",
		"proxy":                              "--standalone FILE",
		"proxy --agent a --standalone b":     "not both",
		"proxy --agent a":                    "--listeners",
		"proxy --standalone b --listeners 2": "leave --listeners out",
	} {
		if got := cli(t, nil, strings.Fields(args)...); got.code != exitNotAsked || !strings.Contains(got.err, want) {
			t.Errorf("%s: code %d, %q; want %q", args, got.code, got.err, want)
		}
	}
}

func TestStatusShowsL7(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/status": strings.Replace(statusOK, `"tables"`, `"l7":{"services":2,"pid":42,"draining":1,"fallbacks":3},"tables"`, 1)})
	got := cli(t, nil, "status", "--socket", a.socket)
	if want := "  L7: 2 services, proxy is process 42, 1 finish what they have, 3 connections balanced at L4 instead\n"; !strings.Contains(got.out, want) {
		t.Errorf("got\n%s\nwant the line\n%s", got.out, want)
	}
}
