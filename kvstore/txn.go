package kvstore

import (
	"errors"
	"fmt"
	"slices"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// maxTxnOps is etcd's default bound for the ops, and for the conditions, of one transaction.
const maxTxnOps = 128

func putOp(key string, value []byte, opts []PutOption) Op {
	return Op{Kind: OpPut, Key: key, Value: value, Leased: slices.Contains(opts, Leased)}
}

// checkTxn refuses what etcd would refuse, so that every Store refuses it, and with a reason.
func checkTxn(conds []Condition, ops []Op) error {
	if len(ops) > maxTxnOps || len(conds) > maxTxnOps {
		return fmt.Errorf("%d conditions and %d ops in one transaction: at most %d each", len(conds), len(ops), maxTxnOps)
	}
	for _, c := range conds {
		switch {
		case c.Key == "":
			return errors.New("condition on an empty key")
		case c.Prefix && c.Revision != 0:
			return fmt.Errorf("condition on prefix %q with revision %d: a prefix can only be compared with 0, which is no key", c.Key, c.Revision)
		}
	}
	written := make(map[string]bool, len(ops))
	for _, op := range ops {
		switch {
		case op.Key == "":
			return errors.New("write of an empty key")
		case op.Kind != OpPut && op.Kind != OpDelete:
			return fmt.Errorf("unknown kind of op %d on %q", op.Kind, op.Key)
		case written[op.Key]:
			return fmt.Errorf("%q is written twice in one transaction", op.Key)
		}
		written[op.Key] = true
	}
	return nil
}

// txnName returns a key that stands for the transaction in messages.
func txnName(conds []Condition, ops []Op) string {
	if len(ops) > 0 {
		return ops[0].Key
	}
	if len(conds) > 0 {
		return conds[0].Key
	}
	return ""
}

// anyLeased tells whether ops need the session's lease.
func anyLeased(ops []Op) bool {
	return slices.ContainsFunc(ops, func(op Op) bool { return op.Kind == OpPut && op.Leased })
}

// etcdCompares translates conditions. A prefix is free exactly if no key of its range has a creation revision:
// etcd compares every key of the range, and for an empty range a key that does not exist.
func etcdCompares(conds []Condition) []clientv3.Cmp {
	var cmps []clientv3.Cmp
	for _, c := range conds {
		switch {
		case c.Prefix:
			cmps = append(cmps, clientv3.Compare(clientv3.CreateRevision(c.Key), "=", 0).WithPrefix())
		case c.Revision == 0:
			cmps = append(cmps, clientv3.Compare(clientv3.CreateRevision(c.Key), "=", 0))
		default:
			cmps = append(cmps, clientv3.Compare(clientv3.ModRevision(c.Key), "=", c.Revision))
		}
	}
	return cmps
}

// etcdOps translates ops, leased ones on lease.
func etcdOps(ops []Op, lease clientv3.LeaseID) []clientv3.Op {
	var out []clientv3.Op
	for _, op := range ops {
		switch {
		case op.Kind == OpDelete:
			out = append(out, clientv3.OpDelete(op.Key))
		case op.Leased:
			out = append(out, clientv3.OpPut(op.Key, string(op.Value), clientv3.WithLease(lease)))
		default:
			out = append(out, clientv3.OpPut(op.Key, string(op.Value)))
		}
	}
	return out
}
