package kvstore

import (
	"context"
	"fmt"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
)

const (
	// listPage is the number of keys that one request of a listing returns at most. It is less when the answer would be larger than maxAnswer.
	listPage = 1000
	// smallPage is how many of the largest keys that etcd stores fit into maxAnswer.
	smallPage = maxAnswer / (2 << 20)
)

// List implements Store.
func (e *etcd) List(ctx context.Context, prefix string) (entries []Entry, err error) {
	_, _, err = e.list(ctx, prefix, func(page []Entry) (enough bool) {
		entries = append(entries, page...)
		return false
	})
	if err != nil {
		return nil, err
	}
	return entries, nil
}

// list hands all entries under prefix to take, page by page and in the order of keys, as of one revision, which it returns. Each page has
// its own request timeout. When take has had enough, rest is the number of entries that are left.
func (e *etcd) list(ctx context.Context, prefix string, take func(page []Entry) (enough bool)) (revision int64, rest int, err error) {
	from, end := prefix, clientv3.GetPrefixRangeEnd(prefix)
	if prefix == "" {
		from, end = "\x00", "\x00"
	}
	for limit := int64(listPage); ; {
		resp, err := e.page(ctx, from, end, revision, limit)
		if limit > 1 && tooLarge(err) {
			limit = min(limit/2, smallPage)
			continue
		}
		if err != nil {
			return 0, 0, e.requestError("list", prefix, err)
		}
		if revision == 0 {
			revision = resp.Header.Revision
		}
		page, size, err := entriesOf(resp, from, prefix)
		if err != nil {
			return 0, 0, e.requestError("list", prefix, err)
		}
		enough := take(page)
		if !resp.More || len(page) == 0 {
			return revision, 0, nil
		}
		if enough {
			return revision, max(0, int(resp.Count)-len(page)), nil
		}
		from = page[len(page)-1].Key + "\x00"
		if size < maxAnswer/4 {
			limit = min(2*limit, listPage)
		}
	}
}

func (e *etcd) page(ctx context.Context, from, end string, revision, limit int64) (*clientv3.GetResponse, error) {
	ctx, cancel := e.request(ctx)
	defer cancel()
	before := e.contact.before()
	resp, err := withNewestUsers(ctx, func() (*clientv3.GetResponse, error) {
		return e.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(limit), clientv3.WithRev(revision))
	})
	if err != nil {
		return nil, err
	}
	e.contact.linearized(before, resp.Header)
	return resp, nil
}

// entriesOf returns the entries of a page, and their size in bytes. A server that answers with something else than was asked for is refused, since
// with pages that never get anywhere a listing would have no end.
func entriesOf(resp *clientv3.GetResponse, from, prefix string) (page []Entry, size int, err error) {
	last := ""
	for _, kv := range resp.Kvs {
		key := string(kv.Key)
		if !strings.HasPrefix(key, prefix) || key < from || key <= last {
			return nil, 0, fmt.Errorf("the server answers with the key %.200q, which was not asked for", key)
		}
		last = key
		size += len(key) + len(kv.Value)
		page = append(page, Entry{Key: key, Value: kv.Value, Revision: kv.ModRevision})
	}
	return page, size, nil
}

// tooLarge tells whether err is that the answer is larger than maxAnswer: gRPC looks at its length and does not read it.
func tooLarge(err error) bool {
	return err != nil && errorCode(err) == codes.ResourceExhausted && strings.Contains(err.Error(), "larger than max")
}
