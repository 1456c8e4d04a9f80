package testbed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// chatInterval is between two questions of one kind.
const chatInterval = 20 * time.Millisecond

// chatter asks servers all the time, in each way that pods have, with a marker in question and answer.
type chatter struct {
	m      *mesh
	marker string
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu    sync.Mutex
	kinds map[string]*answered
}

// answered counts the answers to questions of one kind.
type answered struct {
	n    int
	last time.Time
	// pause is the longest time between two answers, since it was last set to 0.
	pause time.Duration
	err   error // of the last question without one
}

// chat begins to ask from a cluster's client, which is not in the way of anything that is killed, until the test ends: the
// pods directly and the service, over TCP and UDP, IPv4 and IPv6.
func (m *mesh) chat(cluster, marker string, servers ...*PodStatus) *chatter {
	m.Helper()
	ctx, cancel := context.WithCancel(m.Context())
	c := &chatter{m: m, marker: marker, cancel: cancel, kinds: map[string]*answered{}}
	m.Cleanup(c.end)
	from := m.bed.podNS(cluster, "client")
	for _, s := range servers {
		for _, a := range []netip.Addr{s.Address, s.Address6} {
			at := netip.AddrPortFrom(a, backendPort)
			c.ask(ctx, fmt.Sprintf("TCP to %s/%s at %v", s.Cluster, s.Name, at), func() error { return c.askHTTP(ctx, from, at) })
			c.ask(ctx, fmt.Sprintf("UDP to %s/%s at %v", s.Cluster, s.Name, at), c.udpClient(from, at))
		}
	}
	for _, six := range []bool{false, true} {
		url := m.serviceURL(cluster, six) + marker
		c.ask(ctx, "the service at "+url, func() error { return c.askService(ctx, cluster, url) })
		ip := m.serviceIPOf(cluster, six)
		c.ask(ctx, fmt.Sprintf("the service at %v over UDP", ip), func() error { return c.askPackets(ctx, cluster, ip) })
	}
	return c
}

func (c *chatter) end() {
	c.cancel()
	c.wg.Wait()
}

// ask repeats a question until ctx ends.
func (c *chatter) ask(ctx context.Context, kind string, once func() error) {
	kept := &answered{last: time.Now()}
	c.kinds[kind] = kept
	c.wg.Go(func() {
		for {
			err := once()
			now := time.Now()
			c.mu.Lock()
			if err == nil {
				kept.n++
				kept.pause, kept.last = max(kept.pause, now.Sub(kept.last)), now
			} else {
				kept.err = err
			}
			c.mu.Unlock()
			if pause(ctx, chatInterval) != nil {
				return
			}
		}
	})
}

func (c *chatter) askHTTP(ctx context.Context, ns string, at netip.AddrPort) error {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		return c.m.bed.dialIn(ctx, ns, network, address)
	}}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%v/%s", at, c.marker), nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && !bytes.Contains(body, []byte(c.marker)) {
		err = fmt.Errorf("the answer is without the marker: %q", body)
	}
	return err
}

// udpClient returns what sends a packet and waits for it to come back. It is a socket of its own as long as that is of use.
func (c *chatter) udpClient(ns string, at netip.AddrPort) func() error {
	n := 0
	return func() (err error) {
		conn, err := c.m.bed.dialIn(context.Background(), ns, "udp", at.String())
		if err != nil {
			return err
		}
		defer conn.Close()
		n++
		question := fmt.Appendf(nil, "%s %d", c.marker, n)
		if err := conn.SetDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			return err
		}
		if _, err := conn.Write(question); err != nil {
			return err
		}
		answer := make([]byte, 1500)
		got, err := conn.Read(answer)
		if err == nil && !bytes.Equal(answer[:got], question) {
			err = fmt.Errorf("%q came back as %q", question, answer[:got])
		}
		return err
	}
}

// askService has the client's own process ask for a second: the service's address is translated for processes of pods.
func (c *chatter) askService(ctx context.Context, cluster, url string) error {
	var out bytes.Buffer
	argv := []string{"clustermesh", "testbed", "load", "--url", url, "--rate", "30", "--requests", "15", "--timeout", "1s", "-o", "json"}
	code, err := c.m.bed.Exec(ctx, Target{Cluster: cluster, Pod: "client"}, argv, Stdio{Out: &out})
	if err == nil && code != 0 {
		err = fmt.Errorf("some requests failed: %s", out.String())
	}
	return err
}

// askPackets is askService over UDP, by a shell.
func (c *chatter) askPackets(ctx context.Context, cluster string, ip netip.Addr) error {
	const times = 10
	script := fmt.Sprintf(`for i in {1..%d}; do exec 3<>/dev/udp/%v/%d; echo %s $i >&3; timeout 1 dd bs=2000 count=1 <&3 2>/dev/null; exec 3>&-; done`, times, ip, shopPort, c.marker)
	var out bytes.Buffer
	_, err := c.m.bed.Exec(ctx, Target{Cluster: cluster, Pod: "client"}, []string{"bash", "-c", script}, Stdio{Out: &out})
	if n := strings.Count(out.String(), c.marker); err == nil && n != times {
		err = fmt.Errorf("%d of %d packets came back", n, times)
	}
	return err
}

// waitAnswers waits until each kind of question was answered again from now on.
func (c *chatter) waitAnswers(after string) {
	c.m.Helper()
	since := time.Now()
	c.m.eventually("answers after "+after, func() string {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, kind := range slices.Sorted(maps.Keys(c.kinds)) {
			if a := c.kinds[kind]; !a.last.After(since) {
				return fmt.Sprintf("%s: none in %v (%v)", kind, time.Since(since), a.err)
			}
		}
		return ""
	})
}

// pauses forgets how long answers were waited for until now, if any kind has some whose name begins like this, and returns a
// function that says how long they were since then.
func (c *chatter) pauses(kind string) func() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, a := range c.kinds {
		if strings.HasPrefix(name, kind) {
			a.pause, a.last = 0, time.Now()
		}
	}
	return func() (longest time.Duration) {
		c.mu.Lock()
		defer c.mu.Unlock()
		for name, a := range c.kinds {
			if strings.HasPrefix(name, kind) {
				longest = max(longest, a.pause, time.Since(a.last))
			}
		}
		return longest
	}
}

// wantFlowed checks that each kind of question was answered so often.
func (c *chatter) wantFlowed(least int) {
	c.m.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for kind, a := range c.kinds {
		if strings.HasPrefix(kind, "the service") && a.n > 0 {
			continue // each is of many requests
		}
		if a.n < least {
			c.m.Errorf("%s: %d answers, want at least %d (%v)", kind, a.n, least, a.err)
		}
	}
}

// serviceURL returns where a cluster's clients ask the service shop.
func (m *mesh) serviceURL(cluster string, six bool) string {
	m.Helper()
	return "http://" + netip.AddrPortFrom(m.serviceIPOf(cluster, six), shopPort).String() + "/"
}

// serviceIPOf returns the address of one family that a cluster has given the service shop.
func (m *mesh) serviceIPOf(cluster string, six bool) netip.Addr {
	m.Helper()
	client := m.bed.Client(cluster, "node1")
	defer client.Close()
	services, err := client.Services(m.Context())
	if err != nil {
		m.Fatal(err)
	}
	for _, s := range services {
		for _, d := range s.Declared {
			for _, ip := range d.ClusterIPs {
				if d.Cluster == cluster && s.Name.Name == "shop" && ip.Is6() == six {
					return ip
				}
			}
		}
	}
	m.Fatal(errors.New(cluster + " has no address of the service"))
	return netip.Addr{}
}
