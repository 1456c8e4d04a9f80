package kvstore

import (
	"context"
	"strconv"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// Together they bound how long a silent death of the server stays unnoticed: 4 s.
	probeInterval = 2 * time.Second
	probeTimeout  = 2 * time.Second
	// deniedInterval is the longest pause between two probes, and between two attempts to watch, of a store that denies us: it is up to people to change that.
	deniedInterval = 10 * time.Second
)

// health asks the server for a sign of life, at once whenever the connection changes its
// state and otherwise when nothing was heard for probeInterval, until ctx ends.
func (e *etcd) health(ctx context.Context) {
	e.spawn(func() { connectionChanges(ctx, e.client.ActiveConnection(), e.doubt) })
	interval := probeInterval
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.doubt:
		case <-timer.C:
		}
		e.probe(ctx)
		if e.contact.isDenied() {
			interval = min(interval*3/2, deniedInterval)
		} else {
			interval = probeInterval
		}
		timer.Reset(interval)
	}
}

func connectionChanges(ctx context.Context, conn *grpc.ClientConn, changed chan<- struct{}) {
	for state := conn.GetState(); conn.WaitForStateChange(ctx, state); state = conn.GetState() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
}

// ask has the health check ask now.
func (e *etcd) ask() {
	select {
	case e.doubt <- struct{}{}:
	default:
	}
}

// probe reads one key linearizably. It goes around clientv3, whose requests wait for
// a connection and then know nothing but that time ran out: this one fails with the cause.
func (e *etcd) probe(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	before := e.contact.before()
	resp, err := withNewestUsers(ctx, func() (*pb.RangeResponse, error) {
		return e.probeKV.Range(ctx, &pb.RangeRequest{Key: []byte(Prefix + "heartbeat"), CountOnly: true})
	})
	switch {
	case e.ctx.Err() != nil:
	case err != nil:
		e.contact.failed(err)
	default:
		e.contact.linearized(before, resp.Header)
	}
}

// plainCause strips gRPC's framing from an error: what remains is what the operating system, TLS or etcd said.
func plainCause(err error) string {
	s, ok := status.FromError(err)
	if !ok {
		return err.Error()
	}
	text := s.Message()
	if s.Code() == codes.DeadlineExceeded && !strings.Contains(text, "connection error") {
		return "no answer within " + probeTimeout.String()
	}
	if _, cause, ok := strings.Cut(text, "desc = "); ok {
		text = cause
	}
	if unquoted, err := strconv.Unquote(text); err == nil {
		text = unquoted
	}
	text = strings.TrimPrefix(text, "transport: Error while dialing: ")
	return strings.TrimPrefix(text, "transport: ")
}
