package tunnel

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// control is what devices are read and changed by: wgctrl's client.
type control interface {
	Device(name string) (*wgtypes.Device, error)
	ConfigureDevice(name string, cfg wgtypes.Config) error
	Close() error
}

// How long a process in user space may take to answer. One that is stopped will not; one that runs may be short of processor time, and killing it,
// with all its sessions, would make that worse. Peers cost it some arithmetic each when they are added, and a few lines when they are read.
const (
	stoppedWithin = 2 * time.Second
	answerWithin  = 10 * time.Second
	perPeer       = 2 * time.Millisecond
)

// How long a process may be silent before it is killed, and another one started: stopped, or as if it ran.
const (
	stoppedFor = 3 * time.Second
	silentFor  = 20 * time.Second
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
	err = s.call(len(s.sessions), func() error {
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
	return s.call(len(cfg.Peers), func() error { return client.ConfigureDevice(name, cfg) })
}

// call calls f, which is about so many peers, and does not wait for ever for a process in user space; f ends when the process does. The kernel
// always answers.
func (s *slot) call(peers int, f func() error) error {
	if s.kind != KindUserspace {
		return f()
	}
	start, done := time.Now(), make(chan error, 1)
	go func() { done <- f() }()
	last := time.After(answerWithin + time.Duration(peers)*perPeer)
	for first := time.After(stoppedWithin); ; {
		select {
		case err := <-done:
			s.process.silent = time.Time{}
			return err
		case <-first:
			if !stopped(s.process.pid) {
				continue
			}
		case <-last:
		}
		break
	}
	if s.process.silent.IsZero() {
		s.process.silent = start
	}
	why := "does not answer"
	if stopped(s.process.pid) {
		why = "does not answer, since it is stopped"
	}
	return silence{fmt.Errorf("WireGuard's process %d of %s %s; if that goes on, it is killed and started again", s.process.pid, s.name, why)}
}

// stuck tells whether the slot's process has not answered for so long that it is not worth waiting for.
func (s *slot) stuck(now time.Time) bool {
	patience := silentFor
	if stopped(s.process.pid) {
		patience = stoppedFor
	}
	return !s.process.silent.IsZero() && now.Sub(s.process.silent) > patience
}

// stopped tells whether a process is stopped, by a signal or a debugger (proc(5), states T and t).
func stopped(pid int) bool { return strings.EqualFold(processState(pid), "T") }

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
