package tunnel

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"causeway/identity"
)

// wireGuardAlias tells our devices from somebody else's of the same name.
const wireGuardAlias = "causeway wireguard"

// errHopeless is of errors that do not pass by waiting.
var errHopeless = errors.New("it will not go away")

// hopeless marks an error as one that does not pass by waiting; its text stays.
type hopeless struct{ error }

func (h hopeless) Unwrap() error        { return h.error }
func (h hopeless) Is(target error) bool { return target == errHopeless }

// slot is a key with its device. WireGuard.mu is held by whoever uses it.
type slot struct {
	number  uint8
	private wgtypes.Key
	public  identity.WireGuardKey
	made    time.Time
	name    string

	index   int    // of the link; 0: there is none
	kind    string // KindKernel, KindUserspace
	control control
	process process

	young     bool  // its key was made just now, so nobody has a session with it
	ready     bool  // it has all that it should, as far as is known
	brought   bool  // it had once: what is missing from then on is repaired
	fresh     bool  // its device was made or taken over just now, so that whatever is missing was not removed by anybody
	problem   error // why it is not ready
	retry     time.Time
	checked   time.Time     // when all of it was compared
	checkCost time.Duration // of comparing it
	suspect   bool          // the kernel has told of something that may be missing

	sessions map[identity.WireGuardKey]*session
	pace     pace
}

func (w *WireGuard) newSlot(number uint8, private wgtypes.Key, made time.Time) *slot {
	return &slot{
		number: number, private: private, public: identity.WireGuardKey(private.PublicKey()), made: made, name: w.cfg.deviceName(number),
		sessions: map[identity.WireGuardKey]*session{},
	}
}

func (s *slot) disconnect() {
	if s.control != nil {
		s.control.Close()
		s.control = nil
	}
}

// retryAfter is the pause between attempts to bring a slot to what it should be.
const retryAfter = 2 * time.Second

// bring makes the slot's device, its configuration, routes, rule and address what they should be.
func (w *WireGuard) bring(ctx context.Context, s *slot, now time.Time) error {
	err := w.ensure(ctx, s, now)
	if err != nil && ctx.Err() == nil && (s.problem == nil || s.problem.Error() != err.Error()) {
		w.log.Error("WireGuard does not work; what needs it is dropped until it does.", "device", s.name, "error", err)
	}
	if err == nil && s.problem != nil {
		w.log.Info("WireGuard works again.", "device", s.name)
	}
	s.ready, s.problem = err == nil, err
	if err == nil {
		s.brought, s.fresh, s.young = true, false, false
	}
	s.retry, s.checked, s.suspect = now.Add(retryAfter), now, false
	s.checkCost = costOf(time.Since(now), len(w.peers.byKey))
	if err != nil && s.kind == KindUserspace && !alive(s.process.pid) {
		s.retry = later(s.process.next, now.Add(firstBackoff/2))
	}
	if errors.Is(err, errNoAnswer) {
		s.retry = time.Now().Add(retryAfter / 4) // The others that wait for the slots get their turn.
	}
	return err
}

func (w *WireGuard) ensure(ctx context.Context, s *slot, now time.Time) error {
	link, err := w.ensureDevice(ctx, s, now)
	if err != nil {
		return err
	}
	if link.Attrs().Index != s.index || s.control == nil {
		if err := w.take(s, link); err != nil {
			return err
		}
	}
	if link.Attrs().MTU != w.cfg.MTU {
		if err := w.links.LinkSetMTU(link, w.cfg.MTU); err != nil {
			return fmt.Errorf("setting the MTU of %s to %d: %w", s.name, w.cfg.MTU, err)
		}
	}
	if err := w.configure(s, now); err != nil {
		return err
	}
	if link.Attrs().Flags&unix.IFF_UP == 0 {
		err := w.links.LinkSetUp(link)
		if errors.Is(err, unix.EADDRINUSE) {
			return w.portTaken(s)
		}
		if err != nil {
			return fmt.Errorf("setting %s up: %w", s.name, err)
		}
		w.repaired("device", s, 1)
	}
	return w.ensureRoutes(s)
}

// take makes a device that is new, to this agent at least, the slot's.
func (w *WireGuard) take(s *slot, link netlink.Link) error {
	if s.brought {
		w.repaired("device", s, 1)
	}
	s.fresh = true
	w.forget(s)
	s.disconnect()
	// Without an address of its own the link says nothing by itself: no router solicitations, no multicast reports.
	err := w.links.LinkSetIP6AddrGenMode(link, nl.IN6_ADDR_GEN_MODE_NONE)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("switching IPv6's own addresses off on %s: %w", s.name, err)
	}
	if w.cfg.OnDevice != nil {
		if err := w.cfg.OnDevice(s.number, link.Attrs().Index); err != nil {
			return fmt.Errorf("preparing device %s: %w", s.name, err)
		}
	}
	// Only now does the kernel have the module, which a client looks for when it is made.
	err = w.space.run(func() error {
		var err error
		s.control, err = wgctrl.New()
		return err
	})
	if err != nil {
		return fmt.Errorf("opening WireGuard's control: %w", err)
	}
	s.index = link.Attrs().Index
	return nil
}

// repaired counts what somebody else has changed; what was never there was not.
func (w *WireGuard) repaired(what string, s *slot, n int) {
	if n == 0 || !s.brought || s.fresh {
		return
	}
	w.repairs[what] += uint64(n)
	w.log.Warn("Somebody has changed WireGuard; it is as it was.", "device", s.name, "what", what, "number", n)
}

// ensureDevice returns the slot's device, which it makes if there is none.
func (w *WireGuard) ensureDevice(ctx context.Context, s *slot, now time.Time) (netlink.Link, error) {
	link, err := w.findDevice(s)
	if err != nil {
		return nil, err
	}
	kind := kindOf(link)
	if link != nil && w.cfg.Kind != KindAuto && kind != w.cfg.Kind {
		if err := w.removeDevice(ctx, s, link); err != nil {
			return nil, err
		}
		link, kind = nil, ""
	}
	if kind == KindKernel {
		s.kind = KindKernel
		return link, nil
	}
	if link == nil && w.cfg.Kind != KindUserspace {
		link, err := w.addKernelDevice(s)
		if link != nil || err != nil {
			s.kind = KindKernel
			return link, err
		}
	}
	s.kind = KindUserspace
	return w.ensureProcess(ctx, s, link, now)
}

// findDevice returns the device of the slot's name if it is ours, nil if there is none.
func (w *WireGuard) findDevice(s *slot) (netlink.Link, error) {
	link, err := w.links.LinkByName(s.name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("finding device %s: %w", s.name, err)
	}
	if link.Attrs().Alias != wireGuardAlias {
		return nil, hopeless{fmt.Errorf("device %s (%s) exists and is not Causeway's: rename or remove it, or configure another name", s.name, link.Type())}
	}
	return link, nil
}

func kindOf(link netlink.Link) string {
	switch {
	case link == nil:
		return ""
	case link.Type() == "wireguard":
		return KindKernel
	}
	return KindUserspace
}

// addKernelDevice returns nil if the kernel has no WireGuard and the one in user space may be used instead.
func (w *WireGuard) addKernelDevice(s *slot) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = s.name, w.cfg.MTU
	err := w.links.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs})
	if errors.Is(err, unix.EOPNOTSUPP) && w.cfg.Kind == KindAuto {
		return nil, nil
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, hopeless{errors.New("the kernel has no WireGuard: load the module wireguard, or configure the kind auto or userspace")}
	}
	if errors.Is(err, unix.EPERM) {
		return nil, hopeless{fmt.Errorf("adding WireGuard device %s: no right to, it needs CAP_NET_ADMIN: run as root: %w", s.name, err)}
	}
	if err != nil {
		return nil, fmt.Errorf("adding WireGuard device %s: %w", s.name, err)
	}
	link, err := w.links.LinkByName(s.name)
	if err != nil {
		return nil, fmt.Errorf("finding WireGuard device %s: %w", s.name, err)
	}
	if err := w.links.LinkSetAlias(link, wireGuardAlias); err != nil {
		return nil, errors.Join(fmt.Errorf("setting the alias of %s: %w", s.name, err), w.links.LinkDel(link))
	}
	return link, nil
}

// removeDevice removes the device, with its process if it has one.
func (w *WireGuard) removeDevice(ctx context.Context, s *slot, link netlink.Link) error {
	if kindOf(link) != KindKernel {
		if err := w.endProcess(ctx, s); err != nil {
			return err
		}
	}
	if link == nil {
		return nil
	}
	err := w.links.LinkDel(link)
	if err != nil && !errors.Is(err, unix.ENODEV) && !errors.As(err, &netlink.LinkNotFoundError{}) {
		return fmt.Errorf("removing device %s: %w", s.name, err)
	}
	return nil
}

func (w *WireGuard) portTaken(s *slot) error {
	port := w.cfg.Ports[s.number]
	return fmt.Errorf("UDP port %d of %s is taken: stop what uses it (\"ss -lunp sport = :%d\"), or configure others in encryption.ports", port, s.name, port)
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
