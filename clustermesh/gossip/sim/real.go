package sim

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"causeway/clustermesh/gossip"

	"github.com/hashicorp/memberlist"
)

// Sizes in bytes of what members of ours carry besides what memberlist itself does.
const (
	ackPayload = 110 // a network coordinate, in each answer to a probe
	metaBytes  = 32  // of a member, in each exchange of states
)

// pool is real members of memberlist on one network.
type pool struct {
	net     *network
	members []*member
	log     *deaths
}

type member struct {
	*memberlist.Memberlist
	transport *transport
}

// deaths notes which members were declared dead by whom, and when last.
type deaths struct {
	mu       sync.Mutex
	told     map[string]map[string]time.Time // accused → accuser → when
	last     map[string]time.Time            // accused → when
	episodes int                             // declarations of one member that are close together count once
	news     chan struct{}                   // has room for one: there is more in told
}

// together is how long after a declaration others may still follow from it.
const together = 2 * time.Second

func newDeaths() *deaths {
	return &deaths{told: map[string]map[string]time.Time{}, last: map[string]time.Time{}, news: make(chan struct{}, 1)}
}

func (d *deaths) note(accused, by string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.told[accused] == nil {
		d.told[accused] = map[string]time.Time{}
	}
	now := time.Now()
	if now.Sub(d.last[accused]) > together {
		d.episodes++
	}
	d.told[accused][by], d.last[accused] = now, now
	select {
	case d.news <- struct{}{}:
	default:
	}
}

// events is what memberlist tells one member.
type events struct {
	of  string
	log *deaths
}

func (e events) NotifyJoin(*memberlist.Node)    {}
func (e events) NotifyUpdate(*memberlist.Node)  {}
func (e events) NotifyLeave(n *memberlist.Node) { e.log.note(n.Name, e.of) }

// load stands for what our members say of themselves, in bytes that don't compress.
type load struct{}

// noise returns n random bytes.
func noise(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return b
}

func (load) AckPayload() []byte                                         { return noise(ackPayload) }
func (load) NotifyPingComplete(*memberlist.Node, time.Duration, []byte) {}
func (load) NodeMeta(int) []byte                                        { return noise(metaBytes) }
func (load) NotifyMsg([]byte)                                           {}
func (load) GetBroadcasts(int, int) [][]byte                            { return nil }
func (load) LocalState(bool) []byte                                     { return nil }
func (load) MergeRemoteState([]byte, bool)                              {}

// newPool starts n members that know each other, on a network that loses nothing yet. It must be closed.
func newPool(ctx context.Context, n int, delay time.Duration, profile gossip.Profile) (*pool, error) {
	p := &pool{net: newNetwork(delay), log: newDeaths()}
	for i := range n {
		// memberlist's tickers start with the member. Those of nodes have nothing to do with each other.
		err := sleep(ctx, rand.N(profile.GossipInterval))
		if err == nil {
			err = p.add(name(i), profile)
		}
		if err != nil {
			p.close()
			return nil, err
		}
	}
	return p, nil
}

// add starts one member, which joins by one of those that are there.
func (p *pool) add(name string, profile gossip.Profile) error {
	t := p.net.join(name)
	c := memberlist.DefaultLANConfig()
	profile.Apply(c)
	c.Name, c.Label, c.Transport, c.LogOutput = name, "mesh", t, io.Discard
	c.Events, c.Ping, c.Delegate, c.RequireNodeNames = events{name, p.log}, load{}, load{}, true
	c.SecretKey = make([]byte, 32) // any key: all that counts is that there is one
	m, err := memberlist.Create(c)
	if err != nil {
		return fmt.Errorf("start member %s: %w", name, err)
	}
	p.members = append(p.members, &member{m, t})
	if len(p.members) == 1 {
		return nil
	}
	return p.joinAny(m, name)
}

// joinAny has a member join by one of the others. On a busy machine some do not answer in time.
func (p *pool) joinAny(m *memberlist.Memberlist, name string) (err error) {
	for range 10 {
		seed := p.members[rand.IntN(len(p.members)-1)].transport
		if _, err = m.Join([]string{seed.name + "/" + seed.addr.String()}); err == nil {
			return nil
		}
	}
	return fmt.Errorf("join member %s: %w", name, err)
}

// settling is how long members may take to know each other; on a machine that keeps up they take a second.
const settling = time.Minute

// settle waits until every member knows all of them.
func (p *pool) settle(ctx context.Context) error {
	began := time.Now()
	for _, m := range p.members {
		for m.NumMembers() < len(p.members) {
			if time.Since(began) > settling {
				return fmt.Errorf("%d real members still do not know each other after %v: this machine is too busy for so many", len(p.members), settling)
			}
			if err := sleep(ctx, 50*time.Millisecond); err != nil {
				return err
			}
		}
	}
	// The news of who joined goes on for a while after all have heard it, and is no idle traffic.
	return sleep(ctx, 3*time.Second)
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// unheard is how long the last member may take to hear of a death; an exchange of states has come by then.
const unheard = 30 * time.Second

// kill silences the last member and returns how long the first of the others took to declare it dead, and the last.
func (p *pool) kill(ctx context.Context) (first, all time.Duration, err error) {
	last := len(p.members) - 1
	victim := p.members[last]
	p.members = p.members[:last]
	at := time.Now()
	victim.transport.kill()
	if err := victim.Shutdown(); err != nil {
		return 0, 0, err
	}
	deadline := time.NewTimer(unheard)
	defer deadline.Stop()
	for {
		first, all, known := p.log.since(victim.transport.name, at)
		if known >= last {
			return first, all, nil
		}
		select {
		case <-p.log.news:
		case <-deadline.C: // who had declared it dead by mistake just before does not do so again
			return first, all, nil
		case <-ctx.Done():
			return 0, 0, ctx.Err()
		}
	}
}

// since returns how long after at the accused was first and last declared dead, and by how many others.
func (d *deaths) since(accused string, at time.Time) (first, last time.Duration, known int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for by, when := range d.told[accused] {
		took := when.Sub(at)
		if by == accused || took < 0 {
			continue
		}
		if known++; known == 1 || took < first {
			first = took
		}
		last = max(last, took)
	}
	return first, last, known
}

// accusations returns how often a member was declared dead by anybody.
func (d *deaths) accusations() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.episodes
}

// traffic is what members have sent since they started.
func (p *pool) traffic() (packets, bytes int64) {
	for _, m := range p.members {
		packets += m.transport.sent.Load()
		bytes += m.transport.bytes.Load()
	}
	return packets, bytes
}

func (p *pool) close() {
	for _, m := range p.members {
		_ = m.Shutdown() // this transport has nothing that could fail
	}
}
