package main

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"causeway/agent/api"
	"causeway/identity"
)

const (
	keyA = "AwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
	keyB = "AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
)

const encryptionAnswer = `{"mode":"all","devices":[
{"slot":0,"name":"causeway-wg0","kind":"userspace","pid":4242,"key":"` + keyA + `","port":51871,"address":"10.1.1.2","mtu":1440,"made":"2025-05-22T12:00:00Z","preferred":true,"droppedTransmit":5}],
"rotateEverySeconds":2592000,"nextRotation":"2025-06-21T12:00:00Z","rotations":1,"nodes":[
{"cluster":"east","node":"node2","mode":"wireguard","mtu":1390,"session":true,"lastHandshake":"2025-06-01T11:59:00Z","endpoint":"172.29.1.12:51871","receivedBytes":20480,"transmittedBytes":5,"status":{"kind":"done"}},
{"cluster":"west","node":"node1","mode":"closed","mtu":1390,"why":"node west/node1 has published no WireGuard key","status":{"kind":"done"}},
{"cluster":"west","node":"node2","mode":"wireguard","mtu":1290,"keepaliveSeconds":25,"status":{"kind":"done"}}],
"drops":[{"reason":"came without encryption","direction":"ingress","packets":3,"bytes":300}],"repairs":{"route":2,"device":1},
"problems":["packets to west/node1 are dropped: node west/node1 has published no WireGuard key"]}`

func TestEncryptionStatus(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/encryption": encryptionAnswer})
	got := cli(t, nil, "encryption", "status", "--socket", a.socket)
	want := `encryption: all
  - packets to west/node1 are dropped: node west/node1 has published no WireGuard key
  device causeway-wg0 (userspace, process 4242), port 51871/udp, tunnel address 10.1.1.2, MTU 1440
    key ` + keyA + `, 10d old
  the key is changed in 20d

NODE        MTU   HANDSHAKE  IN           OUT      ENDPOINT           KEEPALIVE  MODE
east/node2  1390  1m ago     20 KiB       5 bytes  172.29.1.12:51871  off        wireguard
west/node1  1390  -          -            -        -                  -          closed: node west/node1 has published no WireGuard key
west/node2  1290  never      0 bytes      0 bytes  -                  25s        pending: no session

DROPPED                  DIRECTION  PACKETS
came without encryption  ingress    3
by device causeway-wg0   egress     5

put back after somebody else had removed it: 1 × device, 2 × route
`
	if got.code != exitFailed || got.err != "" || fields(got.out) != fields(want) {
		t.Errorf("got code %d, stderr %q, stdout\n%s\nwant\n%s", got.code, got.err, got.out, want)
	}
	if got := cli(t, nil, "encryption", "status", "-o", "json", "--socket", a.socket); !strings.Contains(got.out, `"lastHandshake": "2025-06-01T11:59:00Z"`) {
		t.Errorf("-o json: %s", got.out)
	}
}

func TestEncryptionStatusOfAChangeThatWaits(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/encryption": `{"mode":"all","devices":[{"slot":0,"name":"causeway-wg0","kind":"kernel","key":"` + keyA + `","made":"2025-06-01T11:00:00Z","preferred":true},
{"slot":1,"name":"causeway-wg1","kind":"kernel","key":"` + keyB + `","made":"2025-06-01T11:59:00Z"}],"rotation":{"step":"moving","since":"2025-06-01T11:59:00Z",
"waiting":[{"cluster":"west","node":"node2","why":"there is no session by the new key yet","since":"2025-06-01T11:59:30Z"}]},"nodes":[],"drops":[],"repairs":{},"problems":[]}`})
	got := cli(t, nil, "encryption", "status", "--socket", a.socket)
	for _, want := range []string{"1h0m old, preferred\n", "1m old, beside it\n", "the key is being changed, moving this node's tunnels to the new one, for 1m\n",
		"waits for west/node2, 30s so far: there is no session by the new key yet\n"} {
		if !strings.Contains(got.out, want) {
			t.Errorf("%q is missing in\n%s", want, got.out)
		}
	}
	if got.code != exitOK {
		t.Errorf("code %d", got.code)
	}
}

// rotatingAgent is an agent whose key is changed, a step each time that it is asked.
type rotatingAgent struct{ steps []string }

func (a *rotatingAgent) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPost {
		fmt.Fprintf(w, `{"key":%q}`, keyB)
		return
	}
	step := a.steps[0]
	if len(a.steps) > 1 {
		a.steps = a.steps[1:]
	}
	fmt.Fprint(w, step)
}

func TestEncryptionRotateWaitsUntilOnlyTheNewKeyIsLeft(t *testing.T) {
	device := func(slot int, key string) string { return fmt.Sprintf(`{"slot":%d,"key":%q}`, slot, key) }
	state := func(rotation, devices string, slot int) string {
		return fmt.Sprintf(`{"mode":"all","rotation":%s,"devices":[%s],"nodes":[{"cluster":"west","node":"node1","mode":"wireguard","slot":%d}]}`, rotation, devices, slot)
	}
	waits := `{"step":"moving","waiting":[{"cluster":"west","node":"node1","why":"there is no session by the new key yet"}]}`
	ended := state("null", device(1, keyB), 1)
	socket := serveAgent(t, &rotatingAgent{steps: []string{
		state(waits, device(0, keyA)+","+device(1, keyB), 0), state("null", device(1, keyB), 0), ended,
	}})
	got := cli(t, nil, "encryption", "rotate", "--wait", "--socket", socket)
	if want := "the new key is " + keyB + "\nall packets go by it, and the old one has ended\n"; got.code != exitOK || got.out != want {
		t.Errorf("got %+v", got)
	}
	for _, tc := range []struct{ state, want string }{
		{state(waits, device(0, keyA), 0), "waiting for west/node1: there is no session by the new key yet; the change goes on"},
		{state("null", device(0, keyA), 0), "another key is in use by now"},
	} {
		socket := serveAgent(t, &rotatingAgent{steps: []string{tc.state}})
		got := cli(t, nil, "encryption", "rotate", "--wait", "--timeout", "400ms", "--socket", socket)
		if got.code != exitFailed || !strings.Contains(got.err, tc.want) {
			t.Errorf("got %+v, want %q", got, tc.want)
		}
	}
}

func TestEncryptionRotateIsRefusedWithTheReason(t *testing.T) {
	socket := serveAgent(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusConflict)
		fmt.Fprint(w, `{"error":"this cluster does not encrypt"}`)
	}))
	got := cli(t, nil, "encryption", "rotate", "--socket", socket)
	if got.code != exitFailed || got.err != "error: this cluster does not encrypt\n" {
		t.Errorf("got %+v", got)
	}
}

func TestStatusSaysWhatIsEncrypted(t *testing.T) {
	got := encryptionText(api.EncryptionSummary{Mode: identity.EncryptAll, Kind: "kernel", Nodes: map[identity.TunnelMode]int{identity.TunnelWireGuard: 3, identity.TunnelClosed: 1}})
	if want := "encryption all by WireGuard (kernel), 3 nodes wireguard, 1 nodes closed"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestMetricsArePrintedAsTheyAre(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/metrics": "# TYPE causeway_problems gauge\ncauseway_problems 0\n"})
	if got := cli(t, nil, "metrics", "--socket", a.socket); got.code != exitOK || got.out != "# TYPE causeway_problems gauge\ncauseway_problems 0\n" {
		t.Errorf("got %+v", got)
	}
}
