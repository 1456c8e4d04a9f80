package tunnel

import (
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// TestSessionThatIsOld: an idle session is one until packets that should renew it don't.
func TestSessionThatIsOld(t *testing.T) {
	start := time.Now()
	have := wgtypes.Peer{LastHandshakeTime: start}
	x := &session{}
	see := func(at time.Duration, sent int64, want bool, what string) {
		t.Helper()
		have.TransmitBytes = sent
		got := x.see(&have, start.Add(at))
		x.shaken, x.handshake, x.sent = got, have.LastHandshakeTime, sent
		if got != want {
			t.Errorf("%s after %s there is a session: %t", what, at, got)
		}
	}
	see(time.Second, 100, true, "young,")
	see(10*time.Minute, 100, true, "idle,")
	see(10*time.Minute+time.Second, 248, true, "renewed by a packet, not answered yet,")
	see(10*time.Minute+4*time.Second, 248, true, "as before,")
	see(10*time.Minute+6*time.Second, 396, false, "not answered for 5 s,")
	see(11*time.Minute, 396, false, "still not answered,")
	have.LastHandshakeTime = start.Add(12 * time.Minute)
	see(12*time.Minute, 500, true, "answered,")
	see(20*time.Minute, 500, true, "idle again,")
	have.LastHandshakeTime = time.Time{}
	see(20*time.Minute, 0, false, "added anew,")
}
