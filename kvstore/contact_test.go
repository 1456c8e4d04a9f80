package kvstore

import (
	"log/slog"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Several requests are under way when a store is wiped; the first answer of the new one tells, and those after it must not tell again.
func TestWipeIsNoticedOnce(t *testing.T) {
	restored := 0
	c := newContact("etcd", func() string { return "user" }, slog.New(slog.DiscardHandler), func() { restored++ })
	c.linearized(c.before(), &pb.ResponseHeader{ClusterId: 1, RaftTerm: 2, Revision: 22})
	first, second := c.before(), c.before()
	old := c.current()
	c.linearized(first, &pb.ResponseHeader{ClusterId: 1, RaftTerm: 2, Revision: 1})
	select {
	case <-old:
	default:
		t.Fatal("the wipe went unnoticed")
	}
	wiped := c.current()
	c.linearized(second, &pb.ResponseHeader{ClusterId: 1, RaftTerm: 2, Revision: 1})
	if c.current() != wiped || restored != 2 { // at the first contact, and by the wipe
		t.Errorf("the wipe was noticed again; restored was called %d times", restored)
	}
	c.linearized(c.before(), &pb.ResponseHeader{ClusterId: 1, RaftTerm: 1, Revision: 1})
	if c.current() == wiped {
		t.Error("the second wipe went unnoticed")
	}
}
