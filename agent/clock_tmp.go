package agent

import "time"

type clock struct{}

func newClock() (clock, error)     { return clock{}, nil }
func (c clock) Now() time.Time { return time.Now() }
