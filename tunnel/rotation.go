package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"causeway/identity"
)

// Begin makes a new key in the slot that is not in use, with a device and all peers, beside the old one; Keys has both then. If its device does not
// work, nothing has changed.
func (w *WireGuard) Begin(ctx context.Context) (identity.TunnelKey, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for number := range uint8(identity.TunnelSlots) {
		if w.slots[number] == nil {
			return w.begin(ctx, number)
		}
	}
	return identity.TunnelKey{}, errors.New("the node has a new WireGuard key already; the old one is to end before there is another")
}

func (w *WireGuard) begin(ctx context.Context, number uint8) (identity.TunnelKey, error) {
	key, err := makeKey(keyFile(w.cfg.StateDir, number))
	if err != nil {
		return identity.TunnelKey{}, err
	}
	now := time.Now()
	s := w.newSlot(number, key, now.UTC().Round(0))
	s.young = true
	w.slots[number] = s
	err = w.bring(ctx, s, now)
	if err == nil {
		err = w.keepSlots()
	}
	if err != nil {
		return identity.TunnelKey{}, errors.Join(fmt.Errorf("beginning a new WireGuard key: %w", err), w.end(ctx, s))
	}
	w.wake()
	return identity.TunnelKey{Slot: number, Key: s.public, Port: w.cfg.Ports[number]}, nil
}

// Prefer makes a slot's key the preferred one.
func (w *WireGuard) Prefer(slot uint8) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if slot >= identity.TunnelSlots || w.slots[slot] == nil {
		return fmt.Errorf("there is no WireGuard key in slot %d", slot)
	}
	old := w.preferred
	w.preferred = slot
	if err := w.keepSlots(); err != nil {
		w.preferred = old
		return err
	}
	return nil
}

// End removes a slot's key, device, peers, rule and routes. The preferred one cannot be ended.
func (w *WireGuard) End(ctx context.Context, slot uint8) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if slot >= identity.TunnelSlots || w.slots[slot] == nil {
		return nil
	}
	if slot == w.preferred {
		return fmt.Errorf("the WireGuard key in slot %d is the one in use: prefer another first", slot)
	}
	return w.end(ctx, w.slots[slot])
}

// end removes all of a slot. What is left if it fails is removed by the next attempt.
func (w *WireGuard) end(ctx context.Context, s *slot) error {
	w.forget(s)
	if err := w.removeSlot(ctx, s); err != nil {
		return err
	}
	s.disconnect()
	w.slots[s.number] = nil
	return w.keepSlots()
}

func (w *WireGuard) removeSlot(ctx context.Context, s *slot) error {
	link, err := w.links.LinkByName(s.name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		link, err = nil, nil
	}
	if err != nil {
		return fmt.Errorf("finding device %s: %w", s.name, err)
	}
	if link == nil || link.Attrs().Alias == wireGuardAlias {
		if err := w.removeDevice(ctx, s, link); err != nil && !errors.Is(err, errHopeless) { // What is somebody else's stays.
			return err
		}
	}
	if err := w.removeRouting(s); err != nil {
		return err
	}
	for _, file := range []string{keyFile(w.cfg.StateDir, s.number), w.logPath(s)} {
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing a file of %s: %w", s.name, err)
		}
	}
	return nil
}

// Received returns how many bytes of packets a slot's device has received in all, so that one sees whether it is still in use.
func (w *WireGuard) Received(slot uint8) (uint64, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if slot >= identity.TunnelSlots || w.slots[slot] == nil {
		return 0, fmt.Errorf("there is no WireGuard key in slot %d", slot)
	}
	link, err := w.links.LinkByName(w.slots[slot].name)
	if err != nil {
		return 0, fmt.Errorf("finding device %s: %w", w.slots[slot].name, err)
	}
	if link.Attrs().Statistics == nil {
		return 0, fmt.Errorf("the kernel counts nothing for device %s", w.slots[slot].name)
	}
	return link.Attrs().Statistics.RxBytes, nil
}

// RemoveWireGuard removes the node's devices, rules and routes and ends their processes, keys in the state directory too: for nodes that do not encrypt (any more).
func RemoveWireGuard(ctx context.Context, cfg WireGuardConfig) error {
	if err := cfg.check(); err != nil {
		return err
	}
	space, err := currentNamespace()
	if err != nil {
		return err
	}
	defer space.close()
	w := &WireGuard{cfg: cfg, log: cfg.Log, space: space}
	if w.links, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("opening a netlink socket: %w", err)
	}
	defer w.links.Close()
	var errs []error
	for number := range uint8(identity.TunnelSlots) {
		errs = append(errs, w.removeSlot(ctx, &slot{number: number, name: cfg.deviceName(number)}))
	}
	for _, name := range []string{slotsName, peersName} {
		if err := os.Remove(filepath.Join(cfg.StateDir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("removing WireGuard's state: %w", err))
		}
	}
	return errors.Join(errs...)
}
