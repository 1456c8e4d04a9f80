package l7

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"

	"causeway/lb"
	"causeway/lb/l7/balance"
)

// TestResetReplacesFrontends also with a stream that is cut before it is whole, which changes nothing.
func TestResetReplacesFrontends(t *testing.T) {
	f := newFeed(balance.NewTable(), slog.New(slog.DiscardHandler))
	has := func() string {
		byPort, _ := f.all()
		if len(byPort[webKey]) != 1 {
			return "not one"
		}
		return byPort[webKey][0].String()
	}
	f.apply(updates(addr(t, "10.0.0.1:80"), lb.AppHTTP))
	whole := updates(addr(t, "10.0.0.2:80"), lb.AppHTTP)
	f.apply(whole[:len(whole)-1])
	if got := has(); got != "10.0.0.1:80" {
		t.Errorf("before Synced: %s", got)
	}
	line, err := json.Marshal(whole)
	if err != nil {
		t.Fatal(err)
	}
	if read, err := f.read(strings.NewReader("\n" + string(line) + "\n")); !read || !errors.Is(err, io.EOF) {
		t.Errorf("read %v, %v", read, err)
	}
	if got := has(); got != "10.0.0.2:80" {
		t.Errorf("after Synced: %s", got)
	}
	if _, err := f.read(strings.NewReader("{not json\n")); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("a bad line: %v", err)
	}
}
