package tunnel

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// dumpTries is how often the kernel is asked for a list that changes while it is told.
const dumpTries = 5

// dump asks the kernel for a list, again if it has changed meanwhile, since something may then be missing in it (NLM_F_DUMP_INTR, netlink(7)).
// A list that never holds still is an error.
func dump[T any](list func() ([]T, error)) (got []T, err error) {
	for range dumpTries {
		if got, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return got, err
		}
	}
	return nil, err
}
