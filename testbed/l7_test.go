package testbed

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// annotations of a service that is balanced at L7, and more.
func l7Shop(more string) string {
	return strings.Replace(shop, `{service.cilium.io/global: "true"}`, `{service.cilium.io/global: "true", service.cilium.io/lb-l7: enabled`+more+`}`, 1)
}

// l7Mesh is two clusters of two nodes with three servers of shop in each, balanced at L7.
func l7Mesh(t *testing.T) *mesh {
	m := newMesh(t)
	for _, c := range []string{"east", "west"} {
		m.server(c, "node2", "shop-more")
	}
	m.waitBackends(6)
	m.apply(l7Shop(""))
	return m
}

// apply declares shop anew in both clusters, and waits until the proxies of east have it.
func (m *mesh) apply(manifest string) {
	m.Helper()
	for _, c := range []string{"east", "west"} {
		client := m.bed.Client(c, "node1")
		_, err := client.ApplyServices(m.Context(), []byte(manifest))
		client.Close()
		if err != nil {
			m.Fatal(err)
		}
	}
	weighted := strings.Contains(manifest, "causeway.io/clusters")
	m.eventually("the proxy of east/node1", func() string {
		out, err := m.cli("l7", "list", "-o", "json")
		if err != nil || strings.Contains(out, `"weights"`) != weighted || strings.Count(out, `"address"`) < 6 {
			return fmt.Sprintf("%v: %s", err, out)
		}
		return ""
	})
	m.eventually("connections to the proxy", func() string {
		r, err := m.shopLoad("east", "http1", "--requests", "1", "--rate", "10")
		if err != nil || r.Failed > 0 {
			return fmt.Sprintf("%v, %s", err, brief(r))
		}
		return ""
	})
}

// cli runs the program that users run, against the bed.
func (m *mesh) cli(args ...string) (string, error) {
	var out, errOut bytes.Buffer
	node := Target{Cluster: "east", Node: "node1"}
	code, err := m.bed.Exec(m.Context(), node, append([]string{"clustermesh"}, args...), Stdio{Out: &out, Err: &errOut})
	if err == nil && code != 0 {
		err = fmt.Errorf("exit code %d: %s", code, errOut.String())
	}
	return out.String(), err
}

// shopLoad sends requests from a cluster's client over few, lasting connections.
func (m *mesh) shopLoad(cluster, protocol string, args ...string) (*LoadResult, error) {
	return m.loadIn(m.Context(), cluster, append([]string{"--url", m.shop, "--protocol", protocol}, args...))
}

func (m *mesh) loadIn(ctx context.Context, cluster string, args []string) (*LoadResult, error) {
	var out, errOut bytes.Buffer
	argv := append([]string{"clustermesh", "testbed", "load", "-o", "json"}, args...)
	if _, err := m.bed.Exec(ctx, Target{Cluster: cluster, Pod: "client"}, argv, Stdio{Out: &out, Err: &errOut}); err != nil {
		return nil, err
	}
	r := new(LoadResult)
	if err := json.Unmarshal(out.Bytes(), r); err != nil {
		return nil, fmt.Errorf("%w in %q, %q", err, out.String(), errOut.String())
	}
	return r, nil
}

// brief leaves out what there may be thousands of.
func brief(r *LoadResult) string {
	if r == nil {
		return "no result"
	}
	return fmt.Sprintf("%d requests, %d failed %v, by %v", r.Requests, r.Failed, r.Errors, r.Servers)
}

// wantShare checks that part of all is within percent points of what it should be.
func (m *mesh) wantShare(what string, got, all int, want, points float64) {
	m.Helper()
	if share := 100 * float64(got) / float64(all); math.Abs(share-want) > points {
		m.Errorf("%s got %.1f %% of %d, want %.1f", what, share, all, want)
	}
}

// under runs fn under 500 requests a second of each protocol, over lasting connections, and wants all of them answered.
func (m *mesh) under(fn func()) {
	m.Helper()
	var tasks sync.WaitGroup
	stop := make(chan struct{})
	results := map[string]*LoadResult{}
	var mu sync.Mutex
	for _, protocol := range []string{"http1", "grpc"} {
		tasks.Go(func() {
			for {
				r, err := m.shopLoad("east", protocol, "--rate", "500", "--duration", "3s")
				mu.Lock()
				if err != nil {
					m.Errorf("%s: %v", protocol, err)
				} else {
					results[protocol] = results[protocol].plus(r)
				}
				mu.Unlock()
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	fn()
	close(stop)
	tasks.Wait()
	for protocol, r := range results {
		if r.Failed > 0 || r.Requests == 0 {
			m.Errorf("%s: %d of %d requests failed: %v", protocol, r.Failed, r.Requests, r.Errors)
		}
		m.Logf("%s: %d requests, %v", protocol, r.Requests, r.By)
	}
}

// grpcFrom returns a connection to shop from a cluster's client pod.
func (m *mesh) grpcFrom(cluster string) *grpc.ClientConn {
	m.Helper()
	address := strings.TrimSuffix(strings.TrimPrefix(m.shop, "http://"), "/") + ":80"
	client, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry(),
		grpc.WithContextDialer(func(ctx context.Context, address string) (conn net.Conn, err error) {
			nsErr := inNS(m.bed.podNS(cluster, "client"), func() error {
				conn, err = new(net.Dialer).DialContext(ctx, "tcp", address)
				return err
			})
			return conn, nsErr
		}))
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { client.Close() })
	return client
}

// TestL7 is what users of lb-l7 rely on, end to end.
func TestL7(t *testing.T) {
	m := l7Mesh(t)
	ctx := t.Context()

	t.Run("one connection of gRPC is spread evenly", func(t *testing.T) {
		r, err := m.shopLoad("east", "grpc", "--requests", "10000", "--rate", "3000")
		if err != nil || r.Failed > 0 || len(r.Servers) != 6 {
			t.Fatalf("%v, %s", err, brief(r))
		}
		for server, n := range r.Servers {
			m.wantShare(server, n, r.Requests, 100.0/6, 5.0/6)
		}
	})
	t.Run("and by the clusters' weights", func(t *testing.T) {
		m.apply(l7Shop(`, causeway.io/clusters: "east=90,west=10"`))
		r, err := m.shopLoad("east", "grpc", "--requests", "10000", "--rate", "3000")
		if err != nil || r.Failed > 0 {
			t.Fatalf("%v, %s", err, brief(r))
		}
		m.wantShare("east", r.By["east"], r.Requests, 90, 0.5)
		m.wantShare("west", r.By["west"], r.Requests, 10, 0.5)
		m.apply(l7Shop(""))
	})
	t.Run("bidirectional streams, and each by a backend of its own", func(t *testing.T) {
		m.apply(l7Shop(""))
		servers := map[string]bool{}
		client := m.grpcFrom("east")
		for range 12 {
			stream, err := client.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, GRPCBidi)
			if err != nil {
				t.Fatal(err)
			}
			for i := range 50 {
				said, heard := wrapperspb.String(fmt.Sprint(i)), new(wrapperspb.StringValue)
				if err := errors.Join(stream.SendMsg(said), stream.RecvMsg(heard)); err != nil || heard.Value != said.Value {
					t.Fatalf("message %d came back as %q, %v", i, heard.Value, err)
				}
			}
			header, err := stream.Header()
			if err != nil || stream.CloseSend() != nil {
				t.Fatal(err)
			}
			if err := stream.RecvMsg(new(wrapperspb.StringValue)); err != io.EOF {
				t.Errorf("the stream's end: %v", err)
			}
			servers[strings.Join(header.Get(ServedByHeader), "")] = true
		}
		if len(servers) != 6 {
			t.Errorf("12 streams of one connection were served by %v", servers)
		}
	})
	t.Run("all backends are replaced one by one", func(t *testing.T) {
		m.under(func() {
			for _, c := range []string{"east", "west"} {
				for _, was := range []struct{ pod, node string }{{"shop-node1", "node1"}, {"shop-node2", "node2"}, {"shop-more", "node2"}} {
					m.server(c, was.node, was.pod+"-new")
					if _, err := m.bed.DeletePod(ctx, c, was.pod, DefaultGrace); err != nil {
						t.Fatal(err)
					}
				}
			}
		})
	})
	t.Run("the proxy is killed", func(t *testing.T) {
		if err := m.bed.Kill(ctx, Victim{Kind: "proxy", Cluster: "east", Node: "node1"}); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		r, err := m.shopLoad("east", "http1", "--requests", "1", "--rate", "1", "--timeout", "5s")
		if took := time.Since(began); err != nil || r.Failed > 0 || r.Latency.Max > 1000 {
			t.Errorf("after %s: %v, %s", took, err, brief(r))
		}
	})
	t.Run("the proxy is upgraded", func(t *testing.T) {
		m.under(func() {
			if out, err := m.cli("l7", "upgrade"); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	})
	t.Run("a node dies", func(t *testing.T) {
		var r *LoadResult
		var err error
		var tasks sync.WaitGroup
		tasks.Go(func() { r, err = m.shopLoad("east", "http1", "--rate", "300", "--duration", "5s") })
		m.eventually("requests", func() string {
			if out, err := m.cli("l7", "stats", "-o", "json"); err != nil || !strings.Contains(out, `"requests"`) {
				return fmt.Sprint(err, out)
			}
			return ""
		})
		if err := m.bed.Kill(ctx, Victim{Kind: kindNode, Cluster: "west", Node: "node2"}); err != nil {
			t.Fatal(err)
		}
		tasks.Wait()
		if err != nil || r.Failed > 0 {
			t.Errorf("%v, %s", err, brief(r))
		}
	})
}
