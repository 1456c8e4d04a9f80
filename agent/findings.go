package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cilium/statedb"

	"causeway/clustermesh"
	"causeway/k8s"
	"causeway/lb"
)

// findingGrace is how long something has to be wrong with a service before its author is told: rollouts, and clusters that change one after the other, pass.
const findingGrace = 5 * time.Second

// findings tells authors of this cluster's Services, by Events, what is wrong with them across clusters. One agent of a cluster does so, for as long as it is
// elected: the next one says once more what is still wrong. Rows that change cost as much as their services have.
type findings struct {
	tables *clustermesh.Tables
	view   func(statedb.ReadTxn, lb.Name) lb.ServiceView
	tell   func(service lb.Name, kind k8s.EventKind, reason, message string)
	grace  time.Duration

	// standing is what is wrong, by service and reason; due what of it has not been told.
	standing map[lb.Name]map[string]*finding
	due      map[*finding]lb.Name
}

// finding is something that is wrong.
type finding struct {
	reason, message string
	since           time.Time
	// told: its author has been, if in other words.
	told bool
}

// Run follows the tables until ctx ends.
func (f *findings) Run(ctx context.Context) error {
	f.standing, f.due = map[lb.Name]map[string]*finding{}, map[*finding]lb.Name{}
	services, targets, err := f.follow()
	if err != nil {
		return err
	}
	defer services.Close()
	defer targets.Close()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		read := f.tables.DB.ReadTxn()
		dirty := map[lb.Name]struct{}{}
		declared, moreServices := services.Next(read)
		for change := range declared {
			dirty[change.Object.Object.Name] = struct{}{}
		}
		moved, moreTargets := targets.Next(read)
		for change := range moved {
			dirty[change.Object.Object.Port.Service] = struct{}{}
		}
		now := time.Now()
		for name := range dirty {
			f.look(read, name, now)
		}
		timer.Reset(f.tellDue(now))
		select {
		case <-moreServices:
		case <-moreTargets:
		case <-timer.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (f *findings) follow() (services statedb.ChangeIterator[*clustermesh.Row[lb.Service]], targets statedb.ChangeIterator[*clustermesh.Row[lb.Target]], err error) {
	t := f.tables
	txn := t.DB.WriteTxn(t.Services, t.Targets)
	defer txn.Abort()
	services, err1 := t.Services.Changes(txn)
	targets, err2 := t.Targets.Changes(txn)
	if err := errors.Join(err1, err2); err != nil {
		return nil, nil, err
	}
	txn.Commit()
	return services, targets, nil
}

// look brings what is known to be wrong with a service up to date.
func (f *findings) look(read statedb.ReadTxn, name lb.Name, now time.Time) {
	view := f.view(read, name)
	var problems []string
	for _, p := range view.Problems() {
		if p.Cluster == view.Self {
			problems = append(problems, p.Reason)
		}
	}
	wrong := map[string]string{
		k8s.ReasonNoHealthyBackend: lb.NoHealthyBackend(view, f.tables.EachTargetOf(read, name)),
		k8s.ReasonConflict:         strings.Join(lb.Conflicts(view), "; "),
		k8s.ReasonUnsupported:      strings.Join(problems, "; "),
	}
	declared := slices.ContainsFunc(view.Declared, func(s lb.Service) bool { return s.Cluster == view.Self && s.Global })
	for reason, message := range wrong {
		old := f.standing[name][reason]
		switch {
		case message == "" && old != nil:
			f.over(name, old, declared)
		case message != "" && old == nil:
			if f.standing[name] == nil {
				f.standing[name] = map[string]*finding{}
			}
			found := &finding{reason: reason, message: message, since: now}
			f.standing[name][reason], f.due[found] = found, name
		case message != "" && old.message != message:
			old.message = message
			f.due[old] = name
		}
	}
}

// over forgets what is wrong no more.
func (f *findings) over(name lb.Name, old *finding, declared bool) {
	delete(f.due, old)
	delete(f.standing[name], old.reason)
	if len(f.standing[name]) == 0 {
		delete(f.standing, name)
	}
	if old.told && old.reason == k8s.ReasonNoHealthyBackend && declared {
		f.tell(name, k8s.EventNormal, k8s.ReasonHealthyBackend, "there is a healthy backend again; there was none from "+moment(old.since))
	}
}

// tellDue tells of what has been wrong for long enough, and returns how long it is until there is more to tell.
func (f *findings) tellDue(now time.Time) time.Duration {
	wait := time.Hour
	for found, name := range f.due {
		if left := f.grace - now.Sub(found.since); left > 0 {
			wait = min(wait, left)
			continue
		}
		message := found.message
		if found.reason == k8s.ReasonNoHealthyBackend { // of which each time is an Event
			message = fmt.Sprintf("%s since %s", message, moment(found.since))
		}
		f.tell(name, k8s.EventWarning, found.reason, message)
		found.told = true
		delete(f.due, found)
	}
	return wait
}

func moment(t time.Time) string { return t.UTC().Format(time.RFC3339) }
