package tunnel

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// control is what devices are read and changed by: wgctrl's client.
type control interface {
	Device(name string) (*wgtypes.Device, error)
	ConfigureDevice(name string, cfg wgtypes.Config) error
	Close() error
}

func openControl() (control, error) { return wgctrl.New() }

// How long a process in user space may take to answer. Peers cost it a handshake's arithmetic each when they are added, and a few lines when
// they are read.
const (
	answerWithin = 2 * time.Second
	perPeerSet   = 2 * time.Millisecond
	perPeerRead  = 200 * time.Microsecond
	// stuckAfter is how long a process may be silent before it is killed, and another one started: longer than one question lasts.
	stuckAfter = 3 * time.Second
)

// errNoAnswer is of questions that a process in user space has not answered in time.
var errNoAnswer = errors.New("no answer")

// silence marks an error as one of a process that does not answer; its text stays.
type silence struct{ error }

func (s silence) Is(target error) bool { return target == errNoAnswer }

// device reads the slot's device.
func (s *slot) device() (device *wgtypes.Device, err error) {
	answer := make(chan *wgtypes.Device, 1)
	client, name := s.control, s.name // of now: the call may outlast the device
	err = s.call(answerWithin+time.Duration(len(s.sessions))*perPeerRead, func() error {
		device, err := client.Device(name)
		answer <- device
		return err
	})
	if err != nil {
		return nil, err
	}
	return <-answer, nil
}

// change writes to the slot's device.
func (s *slot) change(cfg wgtypes.Config) error {
	client, name := s.control, s.name
	return s.call(answerWithin+time.Duration(len(cfg.Peers))*perPeerSet, func() error { return client.ConfigureDevice(name, cfg) })
}

// call calls f, and does not wait for longer than that for a process in user space; f ends when the process does. The kernel always answers.
func (s *slot) call(within time.Duration, f func() error) error {
	if s.kind != KindUserspace {
		return f()
	}
	start, done := time.Now(), make(chan error, 1)
	go func() { done <- f() }()
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case err := <-done:
		s.process.silent = time.Time{}
		return err
	case <-timer.C:
	}
	if s.process.silent.IsZero() {
		s.process.silent = start
	}
	return silence{fmt.Errorf("WireGuard's process %d of %s does not answer%s; if it goes on, it is killed and started again", s.process.pid, s.name, stoppedNote(s.process.pid))}
}

// stuck tells whether the slot's process has not answered for so long that it is not worth waiting for.
func (s *slot) stuck(now time.Time) bool {
	return !s.process.silent.IsZero() && now.Sub(s.process.silent) > stuckAfter
}

// stoppedNote says that a process is stopped, by a signal or a debugger, if it is (proc(5), states T and t).
func stoppedNote(pid int) string {
	if strings.EqualFold(processState(pid), "T") {
		return ": it is stopped"
	}
	return ""
}

// processState returns a process's state, a letter (proc(5)); none if there is no such process.
func processState(pid int) string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The state follows the name, which may contain anything.
	after := strings.LastIndexByte(string(stat), ')')
	if after < 0 || after+2 >= len(stat) {
		return ""
	}
	return string(stat[after+2])
}
