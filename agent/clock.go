package agent

import (
	"fmt"
	"os"
	"time"
)

// ClockOffsetEnv is a variable of the environment that lets an agent take the time for later than it is, or earlier: a duration as
// Go writes it, like 5m or -1h. It is for the test-bed alone, which shows with it what a wrong clock does: Linux has no clock of its own for
// a namespace. On a real node nobody sets it.
const ClockOffsetEnv = "CAUSEWAY_CLOCK_OFFSET"

// clock is the wall clock of an agent: all that compares times with other machines', or with certificates, takes them from here.
type clock struct {
	// offset is how far it is ahead of the machine's.
	offset time.Duration
}

// newClock returns the machine's clock, or one that is wrong as ClockOffsetEnv says.
func newClock() (clock, error) {
	text := os.Getenv(ClockOffsetEnv)
	if text == "" {
		return clock{}, nil
	}
	offset, err := time.ParseDuration(text)
	if err != nil {
		return clock{}, fmt.Errorf("%s=%q is no duration: write it like 5m or -1h, or leave it unset, as on every real node", ClockOffsetEnv, text)
	}
	return clock{offset}, nil
}

// Now returns the time as this agent knows it.
func (c clock) Now() time.Time { return time.Now().Add(c.offset) }
