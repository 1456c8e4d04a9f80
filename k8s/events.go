package k8s

import (
	"context"
	"fmt"
	"hash/fnv"
	"strings"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"causeway/lb"
)

// EventKind is the type of an Event.
type EventKind string

const (
	EventNormal  = EventKind(corev1.EventTypeNormal)
	EventWarning = EventKind(corev1.EventTypeWarning)
)

// Bounds of Events: how many a second at most, in a burst, how many wait to be written, and how many are remembered so that they are not
// written again within eventLife, which is as long as Kubernetes keeps them.
const (
	eventRate  = 1
	eventBurst = 10
	maxEvents  = 200
	maxSent    = 2000
	eventLife  = time.Hour
	eventRetry = 5 * time.Second
	// maxEventMessage is Kubernetes' bound, in bytes.
	maxEventMessage = 1024
)

// recorder writes Events. The name of one follows from what it says, so that the API server takes it once, however many nodes see the same.
type recorder struct {
	s       *Source
	waiting chan *corev1.Event
	// sent are the Events that were handed over, and when. Needs Source.mu.
	sent map[string]time.Time
}

func newRecorder(s *Source) *recorder {
	return &recorder{s: s, waiting: make(chan *corev1.Event, maxEvents), sent: map[string]time.Time{}}
}

// Event says something about a Service where people look: kubectl describe service. It returns at once. An Event that says what one of the last hour has said
// is left out, and so is one of a Service that Kubernetes has not.
func (s *Source) Event(service lb.Name, kind EventKind, reason, message string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if uid, ok := s.services.known[service]; ok {
		s.events.record(service, uid, kind, reason, message, time.Now())
	}
}

// warn tells the author of a Service of a remark. Needs mu.
func (s *Source) warn(service lb.Name, r remark) {
	s.events.record(service, s.services.known[service], EventWarning, r.reason, r.message, time.Now())
}

func (r *recorder) record(service lb.Name, uid types.UID, kind EventKind, reason, message string, now time.Time) {
	if len(message) > maxEventMessage {
		message = strings.ToValidUTF8(message[:maxEventMessage-len("…")], "") + "…"
	}
	e := &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: service.Namespace, Name: eventName(service, uid, reason, message)},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: "v1", Kind: "Service", Namespace: service.Namespace, Name: service.Name, UID: uid,
		},
		Type: string(kind), Reason: reason, Message: message,
		Source:         corev1.EventSource{Component: "causeway", Host: r.s.cfg.Node},
		FirstTimestamp: metav1.NewTime(now), LastTimestamp: metav1.NewTime(now), Count: 1,
		ReportingController: "causeway.io/agent", ReportingInstance: r.s.cfg.Node,
	}
	key := e.Namespace + "/" + e.Name
	if at, ok := r.sent[key]; ok && now.Sub(at) < eventLife {
		return
	}
	if len(r.sent) >= maxSent {
		clear(r.sent) // the API server knows them
	}
	select {
	case r.waiting <- e:
		r.sent[key] = now
	default:
		r.s.cfg.Log.Warn("too many Events, this one is left out", "service", service, "reason", reason, "message", message)
	}
}

// eventName is the same for the same thing, on every node. Names of Services have at most 63 characters.
func eventName(service lb.Name, uid types.UID, reason, message string) string {
	hash := fnv.New64a()
	fmt.Fprintf(hash, "%s\x00%s\x00%s", uid, reason, message)
	return fmt.Sprintf("%s.%016x", service.Name, hash.Sum64())
}

// run writes what is recorded until ctx ends. While the API server is away Events wait.
func (r *recorder) run(ctx context.Context) error {
	limit := rate.NewLimiter(eventRate, eventBurst)
	for {
		select {
		case e := <-r.waiting:
			for limit.Wait(ctx) == nil && !r.write(ctx, e) {
				select {
				case <-time.After(eventRetry):
				case <-ctx.Done():
				}
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// write tells whether that was that: the API server has it, or does not want it.
func (r *recorder) write(ctx context.Context, e *corev1.Event) bool {
	err := r.s.core.Post().Namespace(e.Namespace).Resource("events").Body(e).Do(ctx).Error()
	switch {
	case err == nil, apierrors.IsAlreadyExists(err):
		return true
	case apierrors.ReasonForError(err) == metav1.StatusReasonUnknown, apierrors.IsTooManyRequests(err), apierrors.IsInternalError(err), apierrors.IsServiceUnavailable(err), apierrors.IsTimeout(err), apierrors.IsServerTimeout(err):
		return ctx.Err() != nil
	}
	r.s.cfg.Log.Warn("an Event is not taken", "service", e.InvolvedObject.Namespace+"/"+e.InvolvedObject.Name, "reason", e.Reason, "message", e.Message, "error", err)
	return true
}
