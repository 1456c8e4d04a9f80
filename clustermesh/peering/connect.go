package peering

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"causeway/identity"
)

const (
	// maxSkew of two clusters' clocks. Certificates and tokens are only as good as the clocks that they are compared with.
	maxSkew = 30 * time.Second
	// verifyFor bounds how long packets may take to make the round trip after trust is exchanged.
	verifyFor = 45 * time.Second
	// joinTimeout bounds a single request of the exchange.
	joinTimeout = 10 * time.Second
)

// ConnectOptions of Connect.
type ConnectOptions struct {
	// Isolated: the peers of the peer are not joined.
	Isolated bool
}

// Connect joins the cluster that a token is of, and its peers, and reports progress. It returns nil only when packets have made the round
// trip in both directions. Otherwise nothing is left of it, except that peers of the peer which could not be joined, as the error says, don't undo
// the connection with the peer itself. The token is used as soon as trust was exchanged, whatever comes after.
func (s *Service) Connect(ctx context.Context, token string, o ConnectOptions, report func(Event)) error {
	t, err := ParseToken(token)
	if err != nil {
		return err
	}
	lock, err := s.lockConnecting(ctx)
	if err != nil {
		return err
	}
	defer lock.release(ctx)
	var reporting sync.Mutex
	began := time.Now()
	ordered := func(e Event) { // checks of both sides end at any time
		reporting.Lock()
		defer reporting.Unlock()
		e.At = time.Since(began)
		report(e)
	}
	c := &connect{s: s, token: t, isolated: o.Isolated, report: ordered, began: began}
	if err := c.run(ctx); err != nil {
		return err
	}
	return s.connectPeersOf(ctx, c, lock)
}

// connect is one cluster being joined.
type connect struct {
	s        *Service
	token    Token
	isolated bool
	report   func(Event)
	began    time.Time
	link     *link // with the token, until trust is exchanged
	endpoint string
	own      side
	issuer   side
	// request is the issuer's, for its user in the own store.
	request []byte
	peer    Peer
	undo    undo
}

// run joins the cluster, or leaves nothing.
func (c *connect) run(ctx context.Context) (err error) {
	defer func() {
		if c.link != nil {
			c.link.Close()
		}
	}()
	if err := c.preflight(ctx); err != nil {
		return err
	}
	c.plan()
	if err = c.join(ctx); err == nil {
		err = c.verify(ctx)
	}
	if err == nil {
		err = c.confirm(ctx)
	}
	if err != nil {
		c.takeBack(ctx, err)
		return err
	}
	c.say(StageDone, "connected with %s (ID %d) in %s", c.peer.Name(), c.peer.Cluster.ID, time.Since(c.began).Round(100*time.Millisecond))
	return nil
}

func (c *connect) say(stage Stage, format string, args ...any) {
	c.report(Event{Stage: stage, Peer: c.token.Cluster, Text: fmt.Sprintf(format, args...)})
}

func (c *connect) checked(stage Stage) func(Check) {
	return func(check Check) { c.report(Event{Stage: stage, Peer: c.token.Cluster, Check: &check}) }
}

// preflight finds all that is in the way. It writes nothing.
func (c *connect) preflight(ctx context.Context) (err error) {
	if c.own, err = c.s.side(ctx); err != nil {
		return err
	}
	if err := c.refuseLocally(); err != nil {
		return err
	}
	if now := c.s.Now(); now.After(c.token.Expires) {
		// The issuer's clock decides. If it says otherwise, the clock check does too.
		c.say(StagePreflight, "by this node's clock the token has expired %s ago", now.Sub(c.token.Expires).Round(time.Second))
	}
	if err := c.dial(ctx); err != nil {
		return err
	}
	if err := c.look(ctx); err != nil {
		return err
	}
	return c.probeStores(ctx)
}

// refuseLocally tells what nobody has to be asked for.
func (c *connect) refuseLocally() error {
	switch t := c.token; {
	case t.Authority == c.own.authority:
		return errors.New(sameAuthority(c.s.Self.Cluster, t.Cluster))
	case t.Mesh != c.s.Mesh:
		return fmt.Errorf("the token is of mesh %s, and this cluster is of mesh %s: give both the same gossip.mesh", t.Mesh, c.s.Mesh)
	case t.Cluster == c.s.Self.Cluster:
		return fmt.Errorf("both clusters are called %s: give one of them another cluster.name", t.Cluster)
	}
	return nil
}

// dial connects to the first endpoint that works, which is used for everything that follows.
func (c *connect) dial(ctx context.Context) (err error) {
	var first error
	for _, endpoint := range c.token.Endpoints {
		who := pinned{cluster: c.token.Cluster, authority: c.token.Authority, by: "token"}
		conn, err := probe{c.s, c.s.Self.Cluster, c.token.Cluster, endpoint, who.tls(endpoint, c.s.Now), c.checked(StagePreflight)}.open(ctx)
		if err == nil {
			c.endpoint = endpoint
			c.link, err = over(conn, c.token.Cluster)
			return err
		}
		if first == nil || errors.Is(err, errOther) {
			first = err
		}
	}
	return fmt.Errorf("cluster %s cannot be reached: %w", c.token.Cluster, first)
}

func (c *connect) credential() *Credential {
	return &Credential{Id: c.token.ID, Secret: c.token.Secret}
}

// look asks who is there, compares clocks, and finds conflicts.
func (c *connect) look(ctx context.Context) error {
	began := time.Now()
	answer, err := c.ask(ctx, false)
	if err != nil {
		return err
	}
	rtt := time.Since(began)
	if c.issuer, err = c.readIssuer(answer); err != nil {
		return err
	}
	c.request, c.isolated = answer.GetRequest(), c.isolated || answer.GetIsolated()
	if err := c.checkClock(time.UnixMilli(answer.GetClock()), rtt); err != nil {
		return err
	}
	all := conflicts(c.own, c.issuer)
	for _, conflict := range answer.GetConflicts()[:min(len(answer.GetConflicts()), 64)] {
		if sentence := plain(conflict); !slices.Contains(all, sentence) {
			all = append(all, sentence)
		}
	}
	if id := c.otherID(all); id != 0 {
		return c.renumber(ctx, id)
	}
	if len(all) > 0 {
		return &ConflictError{Cluster: c.token.Cluster, Conflicts: all}
	}
	return nil
}

// ErrRenumbered says that the own cluster takes another ID, since its own was taken: connect again with the same token when the agents
// have begun anew.
var ErrRenumbered = errors.New("the cluster takes another ID, so its agents begin anew; connect again with the same token")

// otherID returns the ID that the own cluster can take if its ID is all that is in the way, and was assigned; otherwise 0.
func (c *connect) otherID(all []string) identity.ClusterID {
	free := freeID(c.own, c.issuer)
	if c.s.Renumber == nil || len(all) == 0 || free == 0 {
		return 0
	}
	ids := idConflicts(c.own, c.issuer)
	if slices.ContainsFunc(all, func(sentence string) bool { return !slices.Contains(ids, sentence) }) {
		return 0
	}
	renumbered := c.own
	renumbered.info.ID = free
	if len(conflicts(renumbered, c.issuer)) > 0 {
		return 0
	}
	return free
}

func (c *connect) renumber(ctx context.Context, id identity.ClusterID) error {
	c.say(StageRenumber, "cluster ID %d of %s is taken in the mesh of %s: it takes %d, and its agents begin anew with it", c.own.info.ID, c.own.info.Name, c.token.Cluster, id)
	if err := c.s.Renumber(ctx, id); err != nil {
		return err
	}
	return ErrRenumbered
}

// ConflictError says why two clusters cannot be joined: all that is in the way, a sentence each, with what to do.
type ConflictError struct {
	Cluster   string
	Conflicts []string
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("cannot connect with cluster %s: %s", e.Cluster, strings.Join(e.Conflicts, "; "))
}

func (c *connect) ask(ctx context.Context, probe bool) (*LookResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	answer, err := c.link.Look(ctx, &LookRequest{Token: c.credential(), Joiner: c.own.message(), Probe: probe})
	return answer, fromPeer(c.token.Cluster, err)
}

// readIssuer reads who has answered, and refuses another than the token is of.
func (c *connect) readIssuer(answer *LookResponse) (side, error) {
	if got := answer.GetIssuer().GetProtocol(); got != Protocol {
		return side{}, errors.New(protocolConflict(c.s.Self.Cluster, Protocol, c.token.Cluster, got))
	}
	issuer, err := parseSide(answer.GetIssuer())
	if err != nil {
		return side{}, fmt.Errorf("cluster %s says of itself what is refused: %w", c.token.Cluster, err)
	}
	if issuer.info.Name != c.token.Cluster || issuer.authority != c.token.Authority {
		return side{}, fmt.Errorf("the token is of cluster %s, but cluster %s has answered at %s", c.token.Cluster, issuer.info.Name, c.endpoint)
	}
	return issuer, nil
}

func (c *connect) checkClock(theirs time.Time, rtt time.Duration) error {
	skew := theirs.Sub(c.s.Now().Add(-rtt / 2))
	ahead := "ahead of"
	if skew < 0 {
		ahead, skew = "behind", -skew
	}
	check := Check{
		Name: CheckClock, From: c.s.Self.Cluster, To: c.token.Cluster, Target: c.endpoint, Outcome: OK, Took: rtt,
		Detail: fmt.Sprintf("%s's clock is %s %s this node's", c.token.Cluster, skew.Round(time.Millisecond), ahead),
	}
	if skew > maxSkew {
		check.Outcome, check.Cause = Failed, fmt.Sprintf("certificates and tokens need clocks that agree within %s: set the clocks, e.g. with NTP", maxSkew)
	}
	c.checked(StagePreflight)(check)
	if check.Outcome != OK {
		return &checkError{check, nil}
	}
	return nil
}

// probeStores tries to reach the other's etcd from both sides at once.
func (c *connect) probeStores(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var there sync.WaitGroup
	defer there.Wait()
	defer cancel()
	answers := make(chan error, 1)
	there.Go(func() {
		answer, err := c.ask(ctx, true)
		if err == nil {
			err = c.reportProbes(answer)
		}
		answers <- err
	})
	if err := c.s.probeStore(ctx, c.s.Self.Cluster, c.issuer, c.checked(StagePreflight)); err != nil {
		return err
	}
	return <-answers
}

// reportProbes passes on what the issuer has tried, and tells why it did not get here.
func (c *connect) reportProbes(answer *LookResponse) error {
	var failed *checkError
	reached := false
	for _, m := range answer.GetProbes()[:min(len(answer.GetProbes()), 3*maxEndpoints)] {
		check := m.check(c.token.Cluster, c.s.Self.Cluster)
		c.checked(StagePreflight)(check)
		if check.Outcome == Failed && failed == nil {
			failed = &checkError{check, nil}
		}
		reached = reached || check.Name == CheckTLS && check.Outcome == OK
	}
	switch {
	case reached:
		return nil
	case failed == nil:
		return fmt.Errorf("cluster %s could not say within %s whether it reaches this cluster's etcd at %s", c.token.Cluster, probing, strings.Join(c.own.store, ", "))
	}
	return fmt.Errorf("cluster %s cannot reach this cluster's etcd: %w", c.token.Cluster, failed)
}

// plan says what will be done.
func (c *connect) plan() {
	i := c.issuer.info
	c.say(StagePlan, "%s is cluster ID %d, with pods in %s and services in %s, version %s", i.Name, i.ID, joined(i.PodCIDRs), joined(i.ServiceCIDRs), i.Version)
	c.say(StagePlan, "each of %s and %s gets a user in the other's etcd, which may read what that exports and write nothing", c.own.info.Name, i.Name)
	if string(c.own.ring) != string(c.issuer.ring) {
		c.say(StagePlan, "%s changes to the gossip keys of %s's mesh", c.own.info.Name, i.Name)
	}
	var joined, apart []string
	for _, k := range c.issuer.peers {
		switch _, already := c.own.peer(k.info.Name); {
		case k.info.Name == c.own.info.Name || already || k.state != Connected:
		case c.isolated || !k.introduced:
			apart = append(apart, k.info.Name)
		default:
			joined = append(joined, k.info.Name)
		}
	}
	if len(joined) > 0 {
		c.say(StagePlan, "%s is connected with %s: joined after it", i.Name, strings.Join(joined, ", "))
	}
	if len(apart) > 0 {
		c.say(StagePlan, "%s is connected with %s: not joined, since it is isolated", i.Name, strings.Join(apart, ", "))
	}
}

// verify sees packets make the round trip in both directions.
func (c *connect) verify(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, verifyFor)
	defer cancel()
	there := make(chan error, 1)
	go func() {
		there <- c.s.call(ctx, c.peer, func(l *link) error { return c.s.remoteVerify(ctx, l, true, c.checked(StageVerify)) })
	}()
	here := c.s.Verify(ctx, c.peer, true, c.checked(StageVerify))
	if here != nil {
		here = fmt.Errorf("as seen from cluster %s: %w", c.s.Self.Cluster, here)
		cancel() // what the other side finds after that changes nothing
	}
	theirs := <-there
	if here != nil && (errors.Is(theirs, context.Canceled) || codeOf(theirs) == codes.Canceled) {
		theirs = nil
	}
	if err := errors.Join(here, theirs); err != nil {
		return fmt.Errorf("trust is exchanged with cluster %s, but it cannot be used: %w", c.peer.Name(), err)
	}
	return nil
}

// confirm makes both records say that the clusters are connected.
func (c *connect) confirm(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	err := c.s.call(ctx, c.peer, func(l *link) error {
		_, err := l.Confirm(ctx, &ConfirmRequest{})
		return err
	})
	if err != nil {
		return err
	}
	p, found, err := c.s.record(ctx, c.peer.Name())
	switch {
	case err != nil:
		return err
	case !found || p.User != c.peer.User:
		return fmt.Errorf("peer %s was disconnected by somebody else meanwhile", c.peer.Name())
	}
	return c.s.connected(ctx, p)
}

// joined lists prefixes for people.
func joined(prefixes []netip.Prefix) string {
	texts := make([]string, len(prefixes))
	for i, p := range prefixes {
		texts[i] = p.String()
	}
	return strings.Join(texts, ", ")
}
