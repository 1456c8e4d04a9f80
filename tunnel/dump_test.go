package tunnel

import (
	"errors"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestDumpIsAskedForAgain(t *testing.T) {
	calls := 0
	got, err := dump(func() ([]int, error) {
		if calls++; calls < 3 {
			return []int{1}, netlink.ErrDumpInterrupted
		}
		return []int{1, 2}, nil
	})
	if err != nil || !slices.Equal(got, []int{1, 2}) || calls != 3 {
		t.Errorf("got %v, %v after %d calls", got, err, calls)
	}
	if got, err := dump(func() ([]int, error) { return []int{1}, netlink.ErrDumpInterrupted }); got != nil || !errors.Is(err, netlink.ErrDumpInterrupted) {
		t.Errorf("a list that never holds still: %v, %v", got, err)
	}
}
