package agent

import (
	"github.com/cilium/statedb"

	"causeway/clustermesh"
	"causeway/lb"
)

// standing is how the targets of one port stand, so that one of them can change without a look at the others. There are three kinds: ready ones;
// leaving ones, which are terminating on a node that is alive; and those whose node is down. New connections are for the first kind, if there
// are none for the second, and for the third if there is nothing else. The kernel knows two kinds, active ones and quarantined ones, and takes
// those if there is no active one. So leaving targets are active as long as their port has no ready one.
type standing struct {
	ready   int
	leaving map[lb.TargetKey]lb.Target
}

// isReady tells whether a row of the targets table is of the first kind.
func isReady(t lb.Target) bool { return !t.Terminating && !t.Quarantined }

// putTarget writes a target whose node is down, or not, and what follows for its port's others.
func (b *balance) putTarget(txn statedb.WriteTxn, target lb.Target, down bool) error {
	s := b.standings[target.Port]
	if s == nil {
		s = &standing{leaving: map[lb.TargetKey]lb.Target{}}
		b.standings[target.Port] = s
	}
	defer b.tidy(target.Port)
	old, _, had := b.tables.Targets.Get(txn, b.tables.Targets.ByKey(clustermesh.TargetKey(target)))
	was, is := had && isReady(old.Object), !down && !target.Terminating
	delete(s.leaving, target.TargetKey)
	if was && !is {
		if err := b.lessReady(txn, s); err != nil {
			return err
		}
	}
	if target.Terminating && !down {
		s.leaving[target.TargetKey] = target
	}
	target.Quarantined = down || target.Terminating && s.ready > 0
	if _, err := clustermesh.Put(txn, b.tables.Targets, target, same); err != nil {
		return err
	}
	if is && !was {
		if s.ready++; s.ready == 1 {
			return b.quarantineLeaving(txn, s, true)
		}
	}
	return nil
}

// dropTarget deletes a target, and writes what follows for its port's others.
func (b *balance) dropTarget(txn statedb.WriteTxn, row *clustermesh.Row[lb.Target]) error {
	if s := b.standings[row.Object.Port]; s != nil {
		defer b.tidy(row.Object.Port)
		delete(s.leaving, row.Object.TargetKey)
		if isReady(row.Object) {
			if err := b.lessReady(txn, s); err != nil {
				return err
			}
		}
	}
	_, _, err := b.tables.Targets.Delete(txn, row)
	return err
}

// lessReady counts a ready target out. It comes before the row of that one is written, so what is active from now on gets into the kernel first:
// there is no moment in which only those are left whose node is down.
func (b *balance) lessReady(txn statedb.WriteTxn, s *standing) error {
	if s.ready--; s.ready > 0 {
		return nil
	}
	return b.quarantineLeaving(txn, s, false)
}

// quarantineLeaving quarantines a port's leaving targets, when it has its first ready one, or ends that, when it has lost its last. It costs as much as
// there are leaving ones, whatever the size of the service; none is so for long.
func (b *balance) quarantineLeaving(txn statedb.WriteTxn, s *standing, quarantined bool) error {
	for _, target := range s.leaving {
		target.Quarantined = quarantined
		if _, err := clustermesh.Put(txn, b.tables.Targets, target, same); err != nil {
			return err
		}
	}
	return nil
}

// tidy forgets a port of which nothing is to be known.
func (b *balance) tidy(port lb.PortKey) {
	if s := b.standings[port]; s.ready == 0 && len(s.leaving) == 0 {
		delete(b.standings, port)
	}
}
