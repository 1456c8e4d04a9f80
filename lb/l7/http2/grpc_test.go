package http2

import (
	"context"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"causeway/lb"
	"causeway/lb/l7/exchange"
)

func TestUnaryCallsOfOneConnectionAreSpread(t *testing.T) {
	const calls, backends = 10_000, 6
	var counts [backends]atomic.Int64
	var list []string
	for i := range backends {
		list = append(list, echoServer(t, func(_ context.Context, v string) (string, error) {
			counts[i].Add(1)
			return v, nil
		}))
	}
	p := newProxy(t, nil, list...)
	cc := p.dial()
	var work sync.WaitGroup
	for range 50 {
		work.Go(func() {
			for range calls / 50 {
				if v, err := say(cc, t.Context(), "hello"); err != nil || v != "hello" {
					t.Errorf("%q, %v", v, err)
					return
				}
			}
		})
	}
	work.Wait()
	for i := range counts {
		if n := counts[i].Load(); n < calls/backends*95/100 || n > calls/backends*105/100 {
			t.Errorf("backend %d got %d of %d", i, n, calls)
		}
	}
	for _, r := range p.records(calls) {
		if r.Protocol != exchange.GRPC || r.Status != 200 || r.GRPC != 0 || r.In != 12 || r.Out != 12 || r.Local != "" {
			t.Fatalf("%+v", r)
		}
	}
}

func TestBidirectionalStreamsOfAnySize(t *testing.T) {
	p := newProxy(t, nil, echoServer(t, nil))
	cc := p.dial()
	var work sync.WaitGroup
	for range 4 {
		work.Go(func() {
			s, err := cc.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/test.Echo/Talk")
			if err != nil {
				t.Error(err)
				return
			}
			for n := 1; n < 2<<20; n *= 3 {
				want := strings.Repeat("x", n)
				var got wrapperspb.StringValue
				if err := s.SendMsg(wrapperspb.String(want)); err != nil {
					t.Error(err)
				}
				if err := s.RecvMsg(&got); err != nil || got.Value != want {
					t.Errorf("%d bytes: %d came, %v", n, len(got.Value), err)
					return
				}
			}
			s.CloseSend()
			if err := s.RecvMsg(&wrapperspb.StringValue{}); err != io.EOF {
				t.Errorf("the end is %v", err)
			}
		})
	}
	work.Wait()
}

func TestDeadlineIsKeptByTheProxy(t *testing.T) {
	stop := make(chan struct{})
	defer close(stop)
	p := newProxy(t, func(o *lb.L7Options, _ *exchange.Limits) { o.Timeout = 200 * time.Millisecond },
		echoServer(t, func(context.Context, string) (string, error) { <-stop; return "", nil }))
	if _, err := say(p.dial(), t.Context(), "x"); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("%v", err)
	}
	if r := p.records(1)[0]; r.GRPC != 4 || r.Local != "timeout" {
		t.Errorf("%+v", r)
	}
}

func TestUnavailableIsRetriedOnAnother(t *testing.T) {
	bad := echoServer(t, func(context.Context, string) (string, error) { return "", status.Error(codes.Unavailable, "no") })
	good := echoServer(t, func(_ context.Context, v string) (string, error) { return v, nil })
	gone := listen(t)
	gone.Close()
	p := newProxy(t, nil, bad, good, gone.Addr().String())
	cc := p.dial()
	for range 6 {
		if v, err := say(cc, t.Context(), "x"); err != nil || v != "x" {
			t.Errorf("%q, %v", v, err)
		}
	}
	retries := 0
	for _, r := range p.records(6) {
		retries += r.Retries
	}
	if retries == 0 {
		t.Error("no record tells of retries")
	}
}

func TestNoBackendIsUnavailable(t *testing.T) {
	p := newProxy(t, nil)
	if _, err := say(p.dial(), t.Context(), "x"); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "no backend") {
		t.Errorf("%v", err)
	}
}

func TestDrainLetsStreamsFinish(t *testing.T) {
	p := newProxy(t, nil, echoServer(t, nil))
	cc := p.dial()
	s, err := cc.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/test.Echo/Talk")
	if err != nil {
		t.Fatal(err)
	}
	var got wrapperspb.StringValue
	for i := range 20 {
		if i == 5 {
			close(p.drain)
		}
		if err := s.SendMsg(wrapperspb.String("x")); err != nil {
			t.Fatal(err)
		}
		if err := s.RecvMsg(&got); err != nil || got.Value != "x" {
			t.Fatalf("%q, %v", got.Value, err)
		}
	}
	s.CloseSend()
	if err := s.RecvMsg(&got); err != io.EOF {
		t.Errorf("%v", err)
	}
}

// TestResetsSayWhy: a backend's reset is to gRPC's client what it would be without a proxy.
func TestResetsSayWhy(t *testing.T) {
	for reset, want := range map[http2.ErrCode]codes.Code{
		http2.ErrCodeCancel: codes.Canceled, http2.ErrCodeEnhanceYourCalm: codes.ResourceExhausted, http2.ErrCodeInternal: codes.Internal,
	} {
		p := newProxy(t, nil, liar(t, func(r *raw, id uint32) { r.WriteRSTStream(id, reset) }))
		c, err := grpc.NewClient(p.address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		err = c.Invoke(t.Context(), "/test.Echo/Say", wrapperspb.String("x"), new(wrapperspb.StringValue))
		if status.Code(err) != want {
			t.Errorf("%s: %v, want %s", reset, err, want)
		}
	}
}
