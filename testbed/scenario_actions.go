package testbed

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"causeway/identity"
)

// action is something that is done to a bed.
type action struct {
	// fault: requests may fail by it.
	fault bool
	// do calls begun, if it takes effect before it returns, with the moment of that; steps go on from then.
	do func(ctx context.Context, r *scenarioRun, begun func(time.Time)) error
}

// actions of the language; docs/scenarios.md says what each does.
var actions = []phrase[action]{
	{"traffic RATE from every cluster", makeTraffic},
	{"traffic RATE from CLUSTER", makeTraffic},
	{"stop traffic", plainAction(false, (*scenarioRun).stopTraffic)},
	{"kill KIND PLACE", makeKill},
	{"start KIND PLACE", makeStart},
	{"partition PLACE from PLACE", makePartition(false)},
	{"lose packets from PLACE to PLACE", makePartition(true)},
	{"lose PERCENT of packets everywhere", makeLoss},
	{"block PORT between PLACE and PLACE", makeBlock},
	{"mtu PLACE PLACE SIZE", makeMTU},
	{"clock PLACE OFFSET", makeClock},
	{"flap NODE down DURATION up DURATION for DURATION", makeFlap},
	{"heal", plainAction(false, func(r *scenarioRun, ctx context.Context) error { return r.world.heal(ctx) })},
	{"run server NAME on NODE", makeRunServer},
	{"delete server SERVER", makeDeleteServer},
	{"churn servers in CLUSTER every DURATION", makeChurn},
	{"stop churn", plainAction(false, func(r *scenarioRun, _ context.Context) error { return r.stopChurn() })},
	{"wait DURATION", makeWait},
}

// plainAction is one that takes effect when it returns.
func plainAction(fault bool, do func(*scenarioRun, context.Context) error) func(arguments, *Setup) (action, error) {
	return func(arguments, *Setup) (action, error) { return simply(fault, do), nil }
}

func simply(fault bool, do func(*scenarioRun, context.Context) error) action {
	return action{fault: fault, do: func(ctx context.Context, r *scenarioRun, _ func(time.Time)) error { return do(r, ctx) }}
}

func makeTraffic(a arguments, s *Setup) (action, error) {
	rate, err := number(a[0], "/s")
	if err != nil {
		return action{}, err
	}
	clusters := s.clusters()
	if len(a) > 1 {
		clusters = a[1:]
		if err := s.checkCluster(a[1]); err != nil {
			return action{}, err
		}
	}
	return simply(false, func(r *scenarioRun, ctx context.Context) error { return r.startTraffic(ctx, clusters, rate) }), nil
}

// victim reads KIND PLACE and checks that the scenario has it.
func (s *Setup) victim(a arguments) (Victim, error) {
	v, err := ParseVictim(a[0], a[1])
	if err == nil {
		err = s.checkCluster(v.Cluster)
	}
	if err == nil && v.Node != "" {
		err = s.checkNode(v.Node)
	}
	return v, err
}

func makeKill(a arguments, s *Setup) (action, error) {
	v, err := s.victim(a)
	return action{fault: true, do: func(ctx context.Context, r *scenarioRun, begun func(time.Time)) error {
		at, err := r.world.kill(ctx, v)
		if err == nil {
			begun(at)
		}
		return err
	}}, err
}

func makeStart(a arguments, s *Setup) (action, error) {
	v, err := s.victim(a)
	if err == nil && v.Kind == kindWireGuard {
		err = fmt.Errorf("%v is started by the node's agent", v)
	}
	return action{do: func(ctx context.Context, r *scenarioRun, begun func(time.Time)) error {
		return r.world.start(ctx, v, begun)
	}}, err
}

func makePartition(oneWay bool) func(arguments, *Setup) (action, error) {
	return func(a arguments, s *Setup) (action, error) {
		return s.partition(Partition{A: a[0], B: a[1], OneWay: oneWay, Loss: 100})
	}
}

func (s *Setup) partition(p Partition) (action, error) {
	err := s.places(p.A, p.B)
	return simply(true, func(r *scenarioRun, ctx context.Context) error { return r.world.partition(ctx, p) }), err
}

func makeLoss(a arguments, _ *Setup) (action, error) {
	percent, err := number(a[0], "%")
	if err == nil {
		err = checkLoss(percent)
	}
	return simply(true, func(r *scenarioRun, ctx context.Context) error { return r.world.lose(ctx, percent) }), err
}

func makeBlock(a arguments, s *Setup) (action, error) {
	port, err := ParsePort(a[0])
	if err != nil {
		return action{}, err
	}
	return s.partition(Partition{A: a[1], B: a[2], Port: port, Loss: 100})
}

func makeMTU(a arguments, s *Setup) (action, error) {
	size, err := strconv.Atoi(a[2])
	if err != nil {
		return action{}, fmt.Errorf("%q is no size in bytes; write it like 1400", a[2])
	}
	p := PathMTU{A: a[0], B: a[1], Size: size}
	err = cmp.Or(s.places(p.A, p.B), checkMTU(size))
	return simply(true, func(r *scenarioRun, ctx context.Context) error { return r.world.mtu(ctx, p) }), err
}

func makeClock(a arguments, s *Setup) (action, error) {
	offset, err := ParseClockOffset(a[1])
	if err == nil {
		_, err = s.scope(a[0])
	}
	return simply(true, func(r *scenarioRun, ctx context.Context) error { return r.world.clock(ctx, a[0], offset) }), err
}

func makeFlap(a arguments, s *Setup) (action, error) {
	node, err := s.node(a[0])
	if err != nil {
		return action{}, err
	}
	var times [3]time.Duration
	for i := range times {
		if times[i], err = parseDuration(a[1+i]); err != nil {
			return action{}, err
		}
	}
	o := FlapOptions{Down: times[0], Up: times[1], Duration: times[2]}
	return simply(true, func(r *scenarioRun, ctx context.Context) error { return r.world.flap(ctx, node, o) }), nil
}

// serverTimeout is within what a server must be up, also while a store is down.
const serverTimeout = 10 * time.Second

func makeRunServer(a arguments, s *Setup) (action, error) {
	node, err := s.node(a[1])
	err = cmp.Or(err, validateName("server", a[0], maxPodName))
	return simply(false, func(r *scenarioRun, ctx context.Context) error { return r.runServer(ctx, node, a[0]) }), err
}

func makeDeleteServer(a arguments, s *Setup) (action, error) {
	err := s.checkServer(a[0])
	return simply(false, func(r *scenarioRun, ctx context.Context) error { return r.deleteServer(ctx, a[0]) }), err
}

func (r *scenarioRun) runServer(ctx context.Context, node identity.NodeName, name string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, serverTimeout, fmt.Errorf("it was not up within %v", serverTimeout))
	defer cancel()
	if err := r.world.runServer(ctx, node, name); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.extra = append(r.extra, node.Cluster+"/"+name)
	return nil
}

func (r *scenarioRun) deleteServer(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, serverTimeout, fmt.Errorf("it was not gone within %v", serverTimeout))
	defer cancel()
	if err := r.world.deleteServer(ctx, name); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.extra = slices.DeleteFunc(r.extra, func(s string) bool { return s == name })
	return nil
}

func makeChurn(a arguments, s *Setup) (action, error) {
	every, err := parseDuration(a[1])
	err = cmp.Or(s.checkCluster(a[0]), err)
	return simply(false, func(r *scenarioRun, ctx context.Context) error { return r.startChurn(ctx, a[0], every) }), err
}

func makeWait(a arguments, _ *Setup) (action, error) {
	d, err := parseDuration(a[0])
	return simply(false, func(_ *scenarioRun, ctx context.Context) error { return pause(ctx, d) }), err
}
