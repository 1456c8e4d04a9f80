package datapath

import (
	"errors"
	"fmt"
	"iter"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// kernelMap is what a table needs of an *ebpf.Map. Tests have one that fails.
type kernelMap interface {
	Lookup(key, valueOut any) error
	Put(key, value any) error
	Delete(key any) error
	Iterate() *ebpf.MapIterator
	MaxEntries() uint32
	Info() (*ebpf.MapInfo, error)
	String() string
}

// table is a map in the kernel with typed keys and values. It reads before it
// writes, so that what is there already is not written again.
type table[K, V comparable] struct {
	m kernelMap
	// writes counts the changes made through this table.
	writes atomic.Uint64
}

func (t *table[K, V]) get(key K) (value V, ok bool, err error) {
	err = t.m.Lookup(&key, &value)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return value, false, nil
	}
	if err != nil {
		return value, false, fmt.Errorf("reading map %s: %w", t.name(), err)
	}
	return value, true, nil
}

// put makes key have value; equal values are not written.
func (t *table[K, V]) put(key K, value V) error {
	old, ok, err := t.get(key)
	if err != nil {
		return err
	}
	if ok && old == value {
		return nil
	}
	if err := t.m.Put(&key, &value); err != nil {
		if errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) {
			err = fmt.Errorf("it is full with %d entries: %w", t.m.MaxEntries(), err)
		}
		return fmt.Errorf("writing map %s: %w", t.name(), err)
	}
	t.writes.Add(1)
	return nil
}

// del removes key; a key that isn't there is no error.
func (t *table[K, V]) del(key K) error {
	err := t.m.Delete(&key)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("deleting from map %s: %w", t.name(), err)
	}
	t.writes.Add(1)
	return nil
}

// all iterates over the map as it is. The map must not be written by others meanwhile,
// or entries are seen twice or not at all; *err tells after the loop whether it went through.
func (t *table[K, V]) all(err *error) iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		var key K
		var value V
		it := t.m.Iterate()
		for it.Next(&key, &value) {
			if !yield(key, value) {
				return
			}
		}
		if e := it.Err(); e != nil {
			*err = fmt.Errorf("listing map %s: %w", t.name(), e)
		}
	}
}

// name is for errors; the kernel keeps 15 bytes of it.
func (t *table[K, V]) name() string {
	if info, err := t.m.Info(); err == nil {
		return info.Name
	}
	return t.m.String()
}
