package agent

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestClock(t *testing.T) {
	for text, want := range map[string]time.Duration{"": 0, "0": 0, "5m": 5 * time.Minute, "+5m": 5 * time.Minute, "-1h": -time.Hour, "-1h0m0s": -time.Hour} {
		t.Setenv(ClockOffsetEnv, text)
		synctest.Test(t, func(t *testing.T) {
			c, err := newClock()
			if err != nil {
				t.Fatal(err)
			}
			if got := -time.Since(c.Now()); got != want {
				t.Errorf("%q: the clock is %v ahead, want %v", text, got, want)
			}
		})
	}
}

func TestClockRefusesWhatItCannotRead(t *testing.T) {
	for _, text := range []string{"5", "5 minutes", "now", " 5m"} {
		t.Setenv(ClockOffsetEnv, text)
		if c, err := newClock(); err == nil || !strings.Contains(err.Error(), ClockOffsetEnv) {
			t.Errorf("%q is accepted as %v, %v", text, c, err)
		}
	}
}
