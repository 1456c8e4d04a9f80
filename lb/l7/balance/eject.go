package balance

import "time"

// longestEjection bounds an ejection, however often there was one before.
const longestEjection = 5 * time.Minute

// eject takes an endpoint that fails again and again out of the plan for a while, unless too many are out already.
func (p *Port) eject(e *endpoint) {
	p.table.mu.RLock()
	defer p.table.mu.RUnlock()
	if p.takeOut(e) {
		p.rebuild()
	}
}

func (p *Port) takeOut(e *endpoint) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	o, all := &p.current.Load().Options, len(p.port.endpoints)
	allowed := all * o.MaxEjected / 100
	if all >= 2 && o.MaxEjected > 0 {
		allowed = max(1, allowed)
	}
	select {
	case <-e.removed:
		return false
	default:
	}
	if e.ejectedUntil.Load() != 0 || p.ejected >= allowed || all < 2 {
		return false
	}
	if !e.back.IsZero() && p.table.now().Sub(e.back) > longestEjection {
		e.multiplier = 0 // It has been well for a long time.
	}
	e.multiplier++
	e.ejectedUntil.Store(p.table.now().Add(min(longestEjection, time.Duration(e.multiplier)*o.EjectFor)).UnixNano())
	e.inARow.Store(0)
	e.ejections.Add(1)
	p.ejected++
	return true
}
