package k8s

import (
	"errors"
	"reflect"

	"github.com/cilium/statedb"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"causeway/clustermesh"
	"causeway/lb"
)

// services writes the Services into the services table. Needs Source.mu.
type services struct {
	*Source
	// known are the Services that there are, whether they have a row or not.
	known map[lb.Name]types.UID
}

func (s *services) all(txn statedb.WriteTxn, objects []*corev1.Service) error {
	gone := make(map[lb.Name]struct{}, len(s.known))
	for name := range s.known {
		gone[name] = struct{}{}
	}
	for _, object := range objects {
		delete(gone, lb.Name{Namespace: object.Namespace, Name: object.Name})
		if err := s.put(txn, object); err != nil {
			return err
		}
	}
	for name := range gone {
		if err := s.remove(txn, name); err != nil {
			return err
		}
	}
	return nil
}

func (s *services) put(txn statedb.WriteTxn, object *corev1.Service) error {
	t, name := s.cfg.Tables, lb.Name{Namespace: object.Namespace, Name: object.Name}
	key := s.cfg.Cluster + "/" + name.String()
	var former *lb.Service
	// Another Service of the same name, which there was while nobody looked, says nothing of this one.
	if row, _, ok := t.Services.Get(txn, t.Services.ByKey(key)); ok && s.known[name] == object.UID {
		former = &row.Object
	}
	s.known[name] = object.UID
	row, remarks, ok := serviceRow(object, former)
	s.show(name, remarks)
	if !ok {
		return clustermesh.Remove(txn, t.Services, key)
	}
	row.Cluster, row.ClusterID = s.cfg.Cluster, s.cfg.ClusterID
	_, err := clustermesh.Put(txn, t.Services, row, sameService)
	return err
}

func (s *services) drop(txn statedb.WriteTxn, object *corev1.Service) error {
	return s.remove(txn, lb.Name{Namespace: object.Namespace, Name: object.Name})
}

func (s *services) remove(txn statedb.WriteTxn, name lb.Name) error {
	delete(s.known, name)
	s.cfg.Refusals.Clear(s.cfg.Cluster, refusalKey(name))
	return clustermesh.Remove(txn, s.cfg.Tables.Services, s.cfg.Cluster+"/"+name.String())
}

// show tells the Service's author what of it is not honoured.
func (s *services) show(name lb.Name, remarks []remark) {
	refused := false
	for _, r := range remarks {
		if r.refused() {
			refused = true
			s.cfg.Refusals.Add(s.cfg.Cluster, refusalKey(name), errors.New(r.message))
		}
		s.warn(name, r)
	}
	if !refused {
		s.cfg.Refusals.Clear(s.cfg.Cluster, refusalKey(name))
	}
}

// refusalKey is how a Service is named among the refusals.
func refusalKey(name lb.Name) string { return "Service " + name.String() }

// sameService compares rows in full.
func sameService(a, b lb.Service) bool { return reflect.DeepEqual(a, b) }
