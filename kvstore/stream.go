package kvstore

import (
	"context"
	"errors"
	"fmt"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

// stream delivers what one watch of etcd brings from the next revision on, until that ends. It goes around clientv3, which would take all that a server sends,
// however slow the reader is: here the server has to wait, so no server can fill our memory.
func (w *watch) stream(ctx context.Context, generation <-chan struct{}) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := pb.NewWatchClient(w.client.ActiveConnection()).Watch(ctx, grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(maxAnswer))
	if err != nil {
		return err
	}
	key, end := w.prefix, clientv3.GetPrefixRangeEnd(w.prefix)
	if w.prefix == "" {
		key, end = "\x00", "\x00"
	}
	err = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte(key), RangeEnd: []byte(end), StartRevision: w.revision + 1, ProgressNotify: true, Fragment: true,
	}}})
	if err != nil {
		return err
	}
	var held []*mvccpb.Event // of a revision that isn't complete yet
	for {
		resp, err := stream.Recv()
		if err != nil {
			return rpctypes.Error(err)
		}
		if resp.Canceled {
			return canceled(resp)
		}
		w.contact.answered(resp.Header)
		select {
		case <-generation: // not the store that was listed: its events must be seen as a difference
			return nil
		default:
		}
		if resp.Created {
			w.contact.watchDenied(w, nil)
			if w.contact.isDenied() {
				w.ask() // not any more
			}
			continue
		}
		var complete []*mvccpb.Event
		if complete, held, err = split(append(held, resp.Events...), resp.Fragment); err != nil {
			return err
		}
		if !w.changes(ctx, complete, resp) {
			return nil
		}
	}
}

// canceled returns why the server ended a watch.
func canceled(resp *pb.WatchResponse) error {
	switch {
	case resp.CompactRevision != 0:
		return rpctypes.ErrCompacted
	case resp.CancelReason != "":
		return fmt.Errorf("the store ended the watch: %s", resp.CancelReason)
	}
	return errors.New("the store ended the watch")
}

// split separates the events of revisions that are complete from those of the last one, if that may go on in another message.
func split(events []*mvccpb.Event, more bool) (complete, held []*mvccpb.Event, err error) {
	if !more || len(events) == 0 {
		return events, nil, nil
	}
	last, at, size := events[len(events)-1].Kv.ModRevision, len(events), 0
	for at > 0 && events[at-1].Kv.ModRevision == last {
		at--
		size += len(events[at].Kv.Key) + len(events[at].Kv.Value)
	}
	if size > maxAnswer {
		return nil, nil, fmt.Errorf("the store sends more than %d bytes as one change", maxAnswer)
	}
	return events[:at], events[at:], nil
}

// changes delivers the events of complete revisions, which are those of resp or, in the midst of a large answer, some of them; false means that ctx ended.
func (w *watch) changes(ctx context.Context, events []*mvccpb.Event, resp *pb.WatchResponse) bool {
	if len(events) == 0 {
		if !resp.Fragment {
			w.revision = max(w.revision, resp.Header.GetRevision())
		}
		return true
	}
	w.revision = max(w.revision, events[len(events)-1].Kv.ModRevision)
	batch := Batch{Revision: w.revision}
	for _, raw := range events {
		key := string(raw.Kv.Key)
		if !strings.HasPrefix(key, w.prefix) {
			continue // nobody asked for it
		}
		ev := Event{Kind: EventPut, Entry: Entry{Key: key, Value: raw.Kv.Value, Revision: raw.Kv.ModRevision}}
		if raw.Type == mvccpb.Event_DELETE {
			ev.Kind, ev.Value = EventDelete, nil
		}
		if ev, needed := w.seen.apply(ev, raw.Kv.CreateRevision == raw.Kv.ModRevision); needed {
			batch.Events = append(batch.Events, ev)
		}
	}
	w.contact.leftOut(w, w.seen.excess)
	w.lookForRoom()
	return len(batch.Events) == 0 || w.deliver(ctx, batch)
}
