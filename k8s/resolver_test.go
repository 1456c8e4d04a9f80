package k8s

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

func TestPodResolver(t *testing.T) {
	var asked atomic.Int32
	r := podResolver("etcd", "sys", func(_ context.Context, name string) (*corev1.Pod, error) {
		asked.Add(1)
		switch name {
		case "etcd-0":
			return &corev1.Pod{Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "192.0.2.7"}, {IP: "2001:db8::7"}}}}, nil
		case "etcd-1":
			return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "pods"}, name)
		}
		return nil, errors.New("the API server is away")
	})
	addresses, err := r.LookupNetIP(t.Context(), "ip", "etcd-0.etcd.sys.svc")
	want := []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")}
	slices.SortFunc(addresses, netip.Addr.Compare)
	if err != nil || !slices.Equal(addresses, want) {
		t.Errorf("a pod's name is %v, %v", addresses, err)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the API server was asked %d times for one pod", n)
	}
	if v4, err := r.LookupNetIP(t.Context(), "ip4", "etcd-0.etcd.sys.svc"); err != nil || len(v4) != 1 {
		t.Errorf("IPv4 only: %v, %v", v4, err)
	}
	var dns *net.DNSError
	if _, err := r.LookupHost(t.Context(), "etcd-1.etcd.sys.svc"); !errors.As(err, &dns) || !dns.IsNotFound {
		t.Errorf("a pod that is not there: %v", err)
	}
	if _, err := r.LookupHost(t.Context(), "etcd-2.etcd.sys.svc"); !errors.As(err, &dns) || dns.IsNotFound {
		t.Errorf("without the API server a pod is said not to be there: %v", err)
	}
}

// TestPodResolverForwards has what is no pod's name asked of the server that it would have been asked of.
func TestPodResolverForwards(t *testing.T) {
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go func() {
		buffer := make([]byte, 1500)
		for {
			n, from, err := server.ReadFrom(buffer)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buffer[:n]) != nil {
				continue
			}
			m.Response = true
			if q := m.Questions[0]; q.Type == dnsmessage.TypeA {
				m.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: dnsmessage.ClassINET}, Body: &dnsmessage.AResource{A: [4]byte{192, 0, 2, 9}},
				}}
			}
			m.Additionals = nil
			if reply, err := m.Pack(); err == nil {
				_, _ = server.WriteTo(reply, from)
			}
		}
	}()
	r := podResolver("etcd", "sys", func(context.Context, string) (*corev1.Pod, error) {
		t.Error("asked for a pod")
		return nil, errors.New("no")
	})
	inner := r.Dial
	r.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
		return inner(ctx, "udp", server.LocalAddr().String())
	}
	for _, name := range []string{"causeway.test.", "a.b.etcd.sys.svc.", "etcd-0.etcd.other.svc."} {
		if got, err := r.LookupHost(t.Context(), name); err != nil || !slices.Equal(got, []string{"192.0.2.9"}) {
			t.Errorf("%s is %v, %v", name, got, err)
		}
	}
}
