package k8s

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

const (
	// podAnswerTTL is how long an answer about a pod is used again: who can't connect looks a name up many times a second.
	podAnswerTTL  = 2 * time.Second
	lookupTimeout = 5 * time.Second
	// maxDNS is the longest message of DNS, in bytes (RFC 1035, 4.2.2).
	maxDNS = 1<<16 - 1
)

// PodResolver resolves the names that cluster DNS has for the pods of one headless Service, POD.SERVICE.NAMESPACE.svc, by asking the API server for the pod; every other
// name as net does. The network's own programs need it: cluster DNS is made of pods, which have no network before those run.
func PodResolver(cfg *rest.Config, service, namespace string) (*net.Resolver, error) {
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	return podResolver(service, namespace, func(ctx context.Context, name string) (*corev1.Pod, error) {
		return client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	}), nil
}

func podResolver(service, namespace string, get func(ctx context.Context, name string) (*corev1.Pod, error)) *net.Resolver {
	p := &podNames{suffix: "." + service + "." + namespace + ".svc.", get: get, known: map[string]podAnswer{}}
	return &net.Resolver{PreferGo: true, Dial: p.dial}
}

// podNames is a DNS server for pods' names, within this process.
type podNames struct {
	suffix string
	get    func(ctx context.Context, name string) (*corev1.Pod, error)

	mu    sync.Mutex
	known map[string]podAnswer
}

type podAnswer struct {
	addresses []netip.Addr
	code      dnsmessage.RCode
	until     time.Time
}

// dial returns a connection that net's resolver speaks DNS over a stream on, since it is no net.PacketConn: a message follows its length in two bytes.
func (p *podNames) dial(_ context.Context, network, server string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	go func() {
		defer ours.Close()
		ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
		defer cancel()
		_ = ours.SetDeadline(time.Now().Add(lookupTimeout))
		query, err := readMessage(ours)
		if err != nil {
			return // who asked has gone
		}
		answer, err := p.answer(ctx, query)
		if err == nil && answer == nil {
			answer, err = forward(ctx, network, server, query)
		}
		if err == nil {
			_ = writeMessage(ours, answer)
		}
	}()
	return theirs, nil
}

// answer returns nil for what is no pod's name.
func (p *podNames) answer(ctx context.Context, query []byte) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		return nil, err
	}
	if len(m.Questions) != 1 {
		return nil, nil
	}
	q := m.Questions[0]
	pod, ok := strings.CutSuffix(strings.ToLower(q.Name.String()), p.suffix)
	if !ok || strings.Contains(pod, ".") {
		return nil, nil
	}
	found := p.find(ctx, pod)
	reply := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: m.ID, Response: true, RecursionDesired: m.RecursionDesired, RecursionAvailable: true, RCode: found.code},
		Questions: m.Questions,
	}
	for _, a := range found.addresses {
		header := dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: dnsmessage.ClassINET}
		switch {
		case q.Type == dnsmessage.TypeA && a.Is4():
			reply.Answers = append(reply.Answers, dnsmessage.Resource{Header: header, Body: &dnsmessage.AResource{A: a.As4()}})
		case q.Type == dnsmessage.TypeAAAA && a.Is6():
			reply.Answers = append(reply.Answers, dnsmessage.Resource{Header: header, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
		}
	}
	return reply.Pack()
}

func (p *podNames) find(ctx context.Context, name string) podAnswer {
	p.mu.Lock()
	defer p.mu.Unlock()
	if known, ok := p.known[name]; ok && time.Now().Before(known.until) {
		return known
	}
	found := podAnswer{until: time.Now().Add(podAnswerTTL)}
	pod, err := p.get(ctx, name)
	switch {
	case apierrors.IsNotFound(err):
		found.code = dnsmessage.RCodeNameError
	case err != nil:
		found.code = dnsmessage.RCodeServerFailure
	default:
		for _, ip := range pod.Status.PodIPs {
			if a, err := netip.ParseAddr(ip.IP); err == nil {
				found.addresses = append(found.addresses, a)
			}
		}
	}
	p.known[name] = found
	return found
}

// forward asks a real server.
func forward(ctx context.Context, network, server string, query []byte) ([]byte, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, server)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	if _, packets := conn.(net.PacketConn); !packets {
		if err := writeMessage(conn, query); err != nil {
			return nil, err
		}
		return readMessage(conn)
	}
	if _, err := conn.Write(query); err != nil {
		return nil, err
	}
	answer := make([]byte, maxDNS)
	n, err := conn.Read(answer)
	return answer[:n], err
}

func readMessage(r io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	message := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(r, message)
	return message, err
}

func writeMessage(w io.Writer, message []byte) error {
	if len(message) > maxDNS {
		return fmt.Errorf("kubernetes: a DNS message of %d bytes", len(message))
	}
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...))
	return err
}
